# Everything runs from one virtual environment that this file makes; PYTHON picks the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export PYTHONPATH := .:bindings$(if $(PYTHONPATH),:$(PYTHONPATH))

# Threads that wait for each other sleep: spinning ones starve where something else needs the cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: install demo test lint bench gpu-check test-abi clean

install: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real training on data inside packages, dense beside pruned; about two minutes on two cores.
demo: $(STAMP)
	$(BIN)/python -m sdgp_cusparselt train digits --seeds 3 --epochs 5 \
	  --methods dense,magnitude,rescaled_magnitude,random --out runs/demo/digits --overwrite
	$(BIN)/python -m sdgp_cusparselt train code-lm --steps 200 \
	  --methods dense,magnitude,mvue --out runs/demo/code-lm --overwrite

test: lint
	$(BIN)/python -m pytest -q -n 2 -m "not gpu and not abi and not slow"

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
