# Everything runs from one virtual environment that this file makes; PYTHON picks the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export PYTHONPATH := .:bindings$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: install demo test lint bench gpu-check test-abi docs clean

install: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck docker/install.sh docker/slurm.sbatch
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

test: lint
	$(BIN)/python -m pytest -q -n 2 -m "not gpu and not abi and not slow"

docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache
