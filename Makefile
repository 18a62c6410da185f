# Two commands for newcomers: `make bench` and `make test`. Both set up a virtual environment first.

PYTHON ?= python3
VENV ?= .venv
OUT ?= bench-results
BUDGET ?= 540

BIN := $(VENV)/bin
READY := $(VENV)/ready
NATIVE_SOURCES := setup.py $(shell find csrc -type f)

.PHONY: bench test test-python test-kernels lint native wheel gpu gpu-full clean

bench: $(READY)  ## how much faster and smaller than plain PyTorch, on this machine
	$(BIN)/python -m benchmarks --quick --out $(OUT)

test: $(READY)  ## every test; the Triton kernels run in Triton's interpreter, in a process of their own
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-python test-kernels

test-python: $(READY)
	$(BIN)/python -m pytest

test-kernels: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreter

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

# No network on a GPU machine: the interpreter that has torch runs everything from the checkout.
gpu:
	BUDGET=$(BUDGET) OUT=$(OUT) $(PYTHON) -m benchmarks.gpu

gpu-full:
	BUDGET=$(BUDGET) OUT=$(OUT) $(PYTHON) -m benchmarks.gpu --full

clean:
	rm -rf build dist *.egg-info annnet_kernels/_C.* .pytest_cache .mypy_cache .ruff_cache
