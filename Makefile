# Everything runs from one virtual environment that this file makes; PYTHON picks the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   := $(VENV)/.installed-demo
export PYTHONPATH := .:bindings$(if $(PYTHONPATH),:$(PYTHONPATH))

# Threads that wait for each other sleep: spinning ones starve where something else needs the cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: install resolve constraints demo test test-abi test-portable test-slow test-foreign lint bench
.PHONY: campaign gpu-check docs look image-check fresh-check clean

install: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -e $(STAMP) || $(BIN)/python -m pip install -q -c constraints.txt -e . scikit-learn matplotlib
	touch $@

# Without installing anything: do the pins resolve for every Python and both builds of torch?
resolve: $(STAMP)
	UV=$(BIN)/uv .ci/resolve

# Pins what pyproject.toml names and constraints.txt does not; UPGRADE="-P numpy" renews one.
constraints: $(STAMP)
	UV=$(BIN)/uv .ci/constraints $(UPGRADE)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run .ci/resolve .ci/constraints .ci/portable docker/install.sh docker/image-check \
	  docker/slurm.sbatch docker/train.sbatch
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

# Real training on data inside packages, dense beside pruned: under three minutes on two cores, after
# an installation of what it needs and no more. The last lines say what was seen.
demo: $(DEMO)
	$(BIN)/python -m sdgp_cusparselt train digits --seeds 2 --epochs 4 \
	  --methods dense,magnitude,mvue --out runs/demo/digits --overwrite
	$(BIN)/python -m sdgp_cusparselt train code-lm --steps 150 --evaluations 3 \
	  --methods dense,magnitude,mvue --out runs/demo/code-lm --overwrite
	$(BIN)/python docs/demo_closing.py runs/demo/digits/results.json runs/demo/code-lm/results.json

test: lint
	$(BIN)/python -m pytest -q -n 3 -m "not gpu and not abi and not slow and not foreign"

# The suite again, on the machines that this one can pose as, with one thread and with four.
test-portable: $(STAMP)
	PYTHON=$(BIN)/python .ci/portable

# Downloads the seven wheels that the binding promises to fit (1.4 GB, once, into build/wheels).
test-abi: $(STAMP)
	$(BIN)/python -m pytest -q -m abi tests/bindings

docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/badges.py
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/accuracy.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Pictures of every page in Chromium, light and dark, wide and narrow, into build/look.
look: docs
	$(BIN)/python docs/look.py

# Both images without a container engine, and what runs in them: see docker/image-check for what it
# needs (root, buildah, mmdebstrap: it installs nothing on this machine) and for its settings.
image-check:
	docker/image-check

# README's commands in a fresh environment per extra; the verdicts go into docs/troubleshooting.md.
fresh-check: $(STAMP)
	$(BIN)/python docs/fresh_environments.py --write

# Training to stated accuracy, fresh environments: minutes each.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# Samples, models and libraries that others wrote; closes with its counts and known differences.
test-foreign: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[foreign]'
	$(BIN)/python -m pytest -q -m foreign tests/foreign

# What a CPU can measure: the fallback, the reference packer, the binding, all as ratios in one run.
bench: $(STAMP)
	mkdir -p build
	$(BIN)/python -m pytest -q bench -k cpu --benchmark-json=build/bench-cpu.json

# What half an hour on a GPU is spent on: one line a call.
campaign:
	@$(PYTHON) bench/campaign.py --list

# Everything that only a GPU can show; uses the python on the PATH, so that it runs in a checkout.
gpu-check:
	SDGP_REQUIRE_GPU=1 $(PYTHON) -m pytest -q -m gpu tests

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache
