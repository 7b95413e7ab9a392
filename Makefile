# Everything runs from a virtual environment that the first target makes. Override PYTHON to choose
# the interpreter, PIP_FLAGS to choose an index (a CPU build of torch, say).
PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2
DEMO_FLAGS ?=
# Compiling kernels keeps CPU cores busy, not the GPU; tests that need much memory share a worker.
GPU_FLAGS ?= -n 8 --dist loadgroup
SHARD ?= 1/1

# Torch's idle threads spin by default. On a machine with other work that makes small operators ten
# times slower; sleeping instead costs nothing measurable on a quiet one.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types unit test-gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# pip itself is left as the interpreter brought it; the stamp is written last, so that an install
# that broke off is done again.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing fp8dispatch and its tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	  --constraint constraints.txt --editable '.[triton,demo,dev]'
	@touch $@

demo: $(STAMP) ## quantise a real sentence encoder to FP8 and compare it with fp32
	@$(BIN)/python -m fp8dispatch.demo $(DEMO_FLAGS)

test: lint types unit ## lint, strict types and the tests

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy --strict

unit: $(STAMP) ## the tests that need no GPU (PYTEST_FLAGS to choose)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

format: $(STAMP) ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A GPU machine keeps its own torch, so this target installs nothing. SHARD=2/3 runs the second of
# three parts; choose as many parts as keep one below 8 minutes.
test-gpu: ## the GPU tests, with the system's python3 (SHARD=1/2)
	$(PYTHON) -m pytest -m gpu --shard=$(SHARD) $(GPU_FLAGS)

clean: ## remove the environment, caches and built files
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find fp8dispatch tests -name __pycache__ -type d -prune -exec rm -rf {} +
