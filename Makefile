# Two commands for newcomers: `make bench` and `make test`. Each installs what it needs and nothing else into a virtual
# environment, builds the C++ extension in the checkout, and prints one line per step.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
OUT ?= bench-results
BUDGET ?= 540

BIN := $(VENV)/bin
BENCH_READY := $(VENV)/ready-bench
TEST_READY := $(VENV)/ready-test
NATIVE_READY := $(VENV)/ready-native
LEVELS_READY := $(VENV)/ready-levels
NATIVE_SOURCES := setup.py $(shell find csrc -type f)

# What a release of PyTorch or Triton can break; rounding is the kernels' own.
VERSION_TESTS := $(addprefix test_,$(addsuffix .py,asymmetric_attention backends batch_norm blocks distributed export \
	folding functional info modules native pyramid_pool replace))

# Tests of what works beside the package, in a process of their own: exporters, compilers, other people's code, programs.
AROUND_TESTS := tests/examples $(wildcard $(addprefix tests/test_,$(addsuffix .py,aoti benchmark* compat* compile* \
	decode_heads docs* export gpu* launches mmseg native onnx p*ging phases plans published* readme scaling setup standin)))

.PHONY: bench install-tests test test-python test-around test-kernels test-oldest lint native wheel gpu gpu-full rehearse launches phases clean

bench: $(BENCH_READY) $(NATIVE_READY)  ## how much faster and smaller than plain PyTorch, on this machine
	@echo "make: the benchmark"
	@$(BIN)/python -m benchmarks --quick --out $(OUT)

install-tests: $(TEST_READY)  ## the environment of the tests, without the C++ extension

# Every test; the Triton kernels run in Triton's interpreter, in a process of their own.
test: $(TEST_READY) $(LEVELS_READY)
	@echo "make: the tests, two processes at a time"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-around test-python test-kernels

test-python: $(TEST_READY) $(LEVELS_READY)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(AROUND_TESTS) tests/interpreter)

test-around: $(TEST_READY) $(LEVELS_READY)
	$(BIN)/python -m pytest $(AROUND_TESTS)

test-kernels: $(TEST_READY) $(LEVELS_READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreter

test-oldest: $(OLDEST)/ready  ## the oldest PyTorch and Triton, against the package as it installs from its sdist
	cd tests && ../$(OLDEST)/bin/pytest $(VERSION_TESTS) -k "not accura and not gradcheck"
	cd tests && TRITON_INTERPRET=1 ../$(OLDEST)/bin/pytest interpreter -k "(accuracy_of_shapes and bfloat16) or norm_skip"

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

native: $(NATIVE_READY)  ## rebuild the extension in place

# Without the extension, which the rules below build in place: pip would build it anew whenever it installs a package.
$(BENCH_READY): pyproject.toml
	@echo "make: the virtual environment $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "make: PyTorch and the packages of the benchmark"
	@$(BIN)/python -m pip install --quiet "setuptools>=64" wheel ninja
	@ANNNET_NATIVE=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	@touch $@

$(TEST_READY): $(BENCH_READY)
	@echo "make: the packages of the tests and linters"
	@ANNNET_NATIVE=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

# Built against the torch of this environment. Each rule leaves behind what the other one must know of it.
$(NATIVE_READY): $(NATIVE_SOURCES) | $(BENCH_READY)
	@echo "make: the C++ extension, for this processor"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@rm -f $(LEVELS_READY)
	@touch $@

$(LEVELS_READY): $(NATIVE_SOURCES) | $(BENCH_READY)
	@echo "make: the C++ extension, for every instruction level that this processor has"
	@ANNNET_CPU_LEVELS=runnable $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $(NATIVE_READY) $@

# Not in place, where the extension is built for the torch of $(VENV). Triton 3.6's interpreter fails with NumPy 2.4.
$(OLDEST)/ready: pyproject.toml $(NATIVE_SOURCES) $(shell find annnet_kernels -name '*.py')
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "setuptools>=64" wheel ninja build pytest hypothesis "torch==2.10.*" "numpy<2.4"
	rm -rf $(OLDEST)/sdist
	$(OLDEST)/bin/python -m build --sdist --no-isolation --outdir $(OLDEST)/sdist
	$(OLDEST)/bin/python -m pip install --no-build-isolation --no-deps --force-reinstall $(OLDEST)/sdist/*.tar.gz
	cd $(OLDEST) && bin/python -m annnet_kernels.info | grep "C++ extension: loaded"
	touch $@

# No network on a GPU machine: the interpreter that has torch runs everything from the checkout.
gpu:
	BUDGET=$(BUDGET) OUT=$(OUT) $(PYTHON) -m tools.gpu

gpu-full:
	BUDGET=$(BUDGET) OUT=$(OUT) $(PYTHON) -m tools.gpu --full

rehearse: $(BENCH_READY)  ## the GPU campaign without a GPU: every stage in its real process, kernels compiled for sm_90
	$(BIN)/python -m tools.gpu.rehearsal

launches: $(BENCH_READY)  ## what a step of the blocks launches, ours and plain, and the host's time; JSON=1 for a program
	@$(BIN)/python -m tools.launches $(if $(JSON),--json)

ARCH ?= 90

phases: $(BENCH_READY) $(NATIVE_READY)  ## what a training step sends to a GPU, and its floors; JSON=1 for a program
	@$(BIN)/python -m tools.phases --arch $(ARCH) $(if $(JSON),--json) $(if $(RECORD),--record $(RECORD))

clean:
	rm -rf build dist *.egg-info annnet_kernels/_C.* .pytest_cache .mypy_cache .ruff_cache
