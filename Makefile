# Each target does its own set-up when it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test lint bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or later is needed (set PYTHON=…)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[solve,onnx,gguf,tensorrt,dev]'
	# The tests' judge of GPTQ and AWQ folders. Its build looks for torch, so it builds in this environment.
	$(PIP) --no-deps defuser device-smi logbar pypcre threadpoolctl tokenicer pillow setuptools wheel
	$(PIP) --no-deps --no-build-isolation gptqmodel
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/qwen3-export demo --output demo-output --force

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python calibration/generate.py --check

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv demo-output
