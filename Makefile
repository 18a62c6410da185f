# Two commands for newcomers: `make bench` and `make test`. Both set up a virtual environment first.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
OUT ?= bench-results
BUDGET ?= 540

BIN := $(VENV)/bin
READY := $(VENV)/ready
NATIVE_SOURCES := setup.py $(shell find csrc -type f)

# What a release of PyTorch or Triton can break.
VERSION_TESTS := $(addprefix test_,$(addsuffix .py,asymmetric_attention backends batch_norm blocks distributed export \
	folding functional info modules native pyramid_pool replace))

.PHONY: bench test test-python test-kernels test-oldest lint native wheel gpu gpu-full clean

bench: $(READY)  ## how much faster and smaller than plain PyTorch, on this machine
	$(BIN)/python -m benchmarks --quick --out $(OUT)

test: $(READY)  ## every test; the Triton kernels run in Triton's interpreter, in a process of their own
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-python test-kernels

test-python: $(READY)
	$(BIN)/python -m pytest

test-kernels: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreter

test-oldest: $(OLDEST)/ready  ## the oldest PyTorch and Triton, against the package as it installs from its sdist
	cd tests && ../$(OLDEST)/bin/pytest $(VERSION_TESTS)
	cd tests && TRITON_INTERPRET=1 ../$(OLDEST)/bin/pytest interpreter -k "accuracy_of_shapes or prologue"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

native: $(READY)  ## rebuild the extension in place

# The extension is built against the torch of this environment, hence no build isolation.
$(READY): pyproject.toml $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "setuptools>=64" wheel ninja "torch>=2.10" numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# Not in place, where the extension is built for the torch of $(VENV). Triton 3.6's interpreter fails with NumPy 2.4.
$(OLDEST)/ready: pyproject.toml $(NATIVE_SOURCES) $(shell find annnet_kernels -name '*.py')
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet "setuptools>=64" wheel ninja build pytest hypothesis "torch==2.10.*" "numpy<2.4"
	rm -rf $(OLDEST)/sdist
	$(OLDEST)/bin/python -m build --sdist --no-isolation --outdir $(OLDEST)/sdist
	$(OLDEST)/bin/python -m pip install --no-build-isolation --no-deps --force-reinstall $(OLDEST)/sdist/*.tar.gz
	cd $(OLDEST) && bin/python -m annnet_kernels.info | grep "C++ extension: loaded"
	touch $@

# No network on a GPU machine: the interpreter that has torch runs everything from the checkout.
gpu:
	BUDGET=$(BUDGET) OUT=$(OUT) $(PYTHON) -m benchmarks.gpu

gpu-full:
	BUDGET=$(BUDGET) OUT=$(OUT) $(PYTHON) -m benchmarks.gpu --full

clean:
	rm -rf build dist *.egg-info annnet_kernels/_C.* .pytest_cache .mypy_cache .ruff_cache
