# Each target does its own set-up when it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
JUDGE := .venv/.gptqmodel
PAGES := .venv/.mkdocs
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test test-fast lint docs bench fuzz clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or later is needed (set PYTHON=…)"; exit 2; }
	@echo "installing everything into .venv: a few minutes, some gigabytes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -e '.[solve,onnx,gguf,tensorrt,cluster,dev]'
	@touch $(STAMP)

# What loads GPTQ and AWQ folders in the tests. A part of it is compiled; where that fails its tests are skipped,
# which CI does not allow. The build looks for torch, so it is done in this environment.
$(JUDGE): $(STAMP)
	@echo "installing GPTQModel, which tests compare with"
	@{ $(PIP) --no-deps defuser device-smi logbar pypcre threadpoolctl tokenicer pillow setuptools wheel \
	&& $(PIP) --no-deps --no-build-isolation gptqmodel && touch $(JUDGE); } \
	|| echo "warning: GPTQModel was not installed, its tests are skipped" >&2

demo: $(STAMP)
	$(BIN)/qwen3-export demo --output demo-output --force

test: $(STAMP) $(JUDGE)
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

# Without the tests that need a runtime, an installation, a peer or many whole runs.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python calibration/generate.py --check

$(PAGES): $(STAMP)
	$(PIP) -e '.[docs]'
	touch $(PAGES)

docs: $(PAGES)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Hostile inputs, 1,000 and more, from a seed: prints `N tried, M faults`. SEED and EACH may be set.
fuzz: $(STAMP)
	$(BIN)/python -m tests.hostile $(if $(SEED),--seed $(SEED)) $(if $(EACH),--each $(EACH))

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv demo-output
