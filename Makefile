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
.PHONY: help demo demo-farmer demo-clift demo-token_reduction demo-concerto demo-bifrost test bench lint clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | \
	    awk -F'\t' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: demo-$(METHOD) ## train FARMER on Fashion-MNIST (or METHOD=clift, token_reduction, concerto, bifrost, all)

demo-farmer: $(VENV)/.installed
	$(RUN) fit --config configs/farmer/demo.yaml $(OFFLINE)
	$(RUN) test --resume runs/latest

# Two processes with half of the batch each.
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

# One core pre-trains from clouds and images together, the other from clouds alone and from images
# alone; then each arm and a random encoder are probed, and one table compares them.
CONCERTO := $(RUN) fit --config configs/concerto/demo.yaml $(OFFLINE)
CLOUDS_ALONE := --model.weights.mask 0.25 --model.weights.roll 0.25 --model.weights.unmask 0.5 --model.weights.cross 0
IMAGES_ALONE := --model.weights.mask 0 --model.weights.roll 0 --model.weights.unmask 0
QUIET := --trainer.enable_progress_bar false
NEWEST = $$(ls -d runs/$(1)-2* | tail -n 1)
PROBE = $(RUN) fit --config configs/concerto/demo_probe.yaml --name probe_$(1) --model.label $(1) $(2) $(QUIET) && \
	$(RUN) test --resume "$(call NEWEST,point_segmentation/probe_$(1))" $(QUIET)
PRETRAINED = --model.pretrained "$(call NEWEST,concerto/$(1))"

demo-concerto: $(VENV)/.installed
	$(BIN)/python -c "from datamodules.paired_2d3d.embedded_root import embedded_root; print(embedded_root(None))"
	{ $(CONCERTO) --name clouds $(CLOUDS_ALONE) $(QUIET) && $(CONCERTO) --name images $(IMAGES_ALONE) $(QUIET); } & \
	$(CONCERTO) --name joint && wait $$!
	{ $(call PROBE,random,) && $(call PROBE,clouds,$(call PRETRAINED,clouds)); } & \
	{ $(call PROBE,images,$(call PRETRAINED,images)) && $(call PROBE,joint,$(call PRETRAINED,joint)); } && wait $$!
	$(BIN)/python -m lightning_modules.probe_table $(foreach arm,random clouds images joint,"$(call NEWEST,point_segmentation/probe_$(arm))")

# One core trains the branch, the other the ControlNet; they need each other only from then on.
demo-bifrost: $(VENV)/.installed
	$(RUN) fit --config configs/bifrost/demo_branch.yaml --name branch $(OFFLINE) $(QUIET) & \
	$(RUN) fit --config configs/bifrost/demo_controlnet.yaml --name controlnet $(OFFLINE) && wait $$!
	$(RUN) test --resume "$(call NEWEST,bifrost_branch/branch)" $(QUIET) & \
	$(RUN) test --resume "$(call NEWEST,bifrost_controlnet/controlnet)" \
	    --model.branch "$(call NEWEST,bifrost_branch/branch)" && wait $$!
	$(RUN) predict --resume "$(call NEWEST,bifrost_controlnet/controlnet)" \
	    --model.branch "$(call NEWEST,bifrost_branch/branch)" --model.pictures_per_prompt 4 \
	    --data.prompts configs/bifrost/demo_prompts.txt

# All five, one after the other, then one page of what they have shown.
demo-all: $(VENV)/.installed
	mkdir -p runs && touch runs/.demo-all
	for method in farmer clift token_reduction concerto bifrost; do \
	    $(MAKE) --no-print-directory demo METHOD=$$method || exit 1; done
	$(BIN)/python -m lightning_modules.demo_report runs --newer runs/.demo-all --out runs/report.html

demo-%:
	@echo "METHOD=$*: no such demo; there are METHOD=farmer, clift, token_reduction, concerto, bifrost and all" >&2; exit 1

test: $(VENV)/.installed-dev lint ## lint, type-check and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: $(VENV)/.installed ## time every part: runs/benchmarks.md (BENCH=--quick is shorter)
	$(BIN)/python benchmarks/everything.py $(BENCH)

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
