# `make demo` trains a demo and draws what it learnt; `make test` runs every check. Both first set
# up .venv if it is not there or pyproject.toml has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
METHOD ?= farmer
# The demos' matrices are too small for threads, which only wait for one another.
RUN := OMP_NUM_THREADS=1 $(BIN)/python train.py
TWO := --trainer.devices 2 --trainer.strategy ddp
OFFLINE := --config configs/logger/wandb_offline.yaml

# Pip's own chatter is kept short; wandb stays offline unless a configuration says otherwise.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-farmer demo-clift demo-token_reduction test lint clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | \
	    awk -F'\t' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: demo-$(METHOD) ## train FARMER on Fashion-MNIST (or METHOD=clift, METHOD=token_reduction)

demo-farmer: $(VENV)/.installed
	$(RUN) fit --config configs/farmer/demo.yaml $(OFFLINE)
	$(RUN) test --resume runs/latest

# Two processes with half of the batch each: ten minutes instead of fifteen.
demo-clift: $(VENV)/.installed
	$(RUN) fit --config configs/clift/demo_stage1.yaml $(OFFLINE) $(TWO) --data.batch_size 2
	$(RUN) fit --config configs/clift/demo_stage2.yaml $(OFFLINE) $(TWO) --data.batch_size 2 \
	    --model.pretrained "$$(readlink -f runs/latest)"
	$(RUN) test --resume runs/latest
	$(RUN) predict --resume runs/latest

demo-token_reduction: $(VENV)/.installed
	$(RUN) fit --config configs/token_reduction/demo.yaml $(OFFLINE) $(TWO) --data.batch_size 16
	$(RUN) test --resume runs/latest
	$(RUN) predict --resume runs/latest

demo-%:
	@echo "METHOD=$*: no such demo; there are METHOD=farmer, clift and token_reduction" >&2; exit 1

test: $(VENV)/.installed-dev lint ## lint, type-check and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Quintet needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	         "Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.installed
