# `make demo` and `make test` each set everything up on a fresh machine: Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
JOBS ?= logical
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist worksteal
# tests of what runs on an accelerator: on the machine's own, or on two pretended cards
PYTEST_GPU := PRETENDED_GPUS=2 $(PYTEST) -p tests.pretended_gpu tests/gpu tests/oracles/test_forecasts.py

# compiled Python is kept in the environment, also where a setting forbids it beside the sources: else
# every process that tests start compiles torch and transformers anew, in ten seconds
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/pycache

.PHONY: demo demo-short test test-slow test-engines lint format docs bench clean

demo: $(VENV)/.installed
	$(BIN)/slimvlm demo run --out $(OUT) --force

demo-short: $(VENV)/.installed
	$(BIN)/slimvlm demo run --short --out $(OUT) --force

test: $(VENV)/.ready
	$(PYTEST) -m "not slow and not gpu"
	$(PYTEST_GPU) -m "not slow"

# the slow tests; shapes and types of every call are checked on the CPU, but not in whole runs, which
# would take twice as long
WHOLE_RUNS := tests/journeys tests/oracles tests/trust
test-slow: $(VENV)/.engines
	$(PYTEST) -m "slow and not gpu and not engine" --jaxtyping-packages=slimvlm,tests.typecheck \
	  $(WHOLE_RUNS:%=--ignore=%)
	$(PYTEST) -m "slow and not gpu and not engine" $(WHOLE_RUNS)
	$(PYTEST_GPU) -m slow

# engines that serve checkpoints, each in an environment of its own (5 GB); writes the table in
# docs/engines.md
test-engines: $(VENV)/.engines
	SLIMVLM_WRITE_ENGINE_TABLE=1 $(BIN)/python -m pytest tests/journeys/test_engines.py

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/calibration.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[demo]'
	touch $@

# what tests and checks need beside it
$(VENV)/.ready: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[demo,dev]'
	touch $@

# programs that slow tests compare with: llama.cpp, Ray, quantisers
$(VENV)/.engines: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[engines]'
	touch $@

clean:
	rm -rf $(VENV) runs site .mypy_cache .ruff_cache .pytest_cache
