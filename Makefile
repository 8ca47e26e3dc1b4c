# One command each; every target sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format bench clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## Create .venv with everything pinned by constraints.txt

demo: $(STAMP) ## Make a small corpus, run the main job on it on CPU, show the tables and a picture
	$(BIN)/python jobs/demo.py

test: $(STAMP) ## Lint, types and tests (2 cores, no network, no GPU)
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest

test-slow: $(STAMP) ## Also the slow tests: full ViT-H goldens, long videos
	$(BIN)/python -m pytest -m slow

lint: $(STAMP) ## Ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Ratios against named baselines, one run; see docs/BENCHMARKS.md
	$(BIN)/python -m tests.benchmark

clean: ## Remove the environment and everything made
	rm -rf $(VENV) demo_output .pytest_cache .mypy_cache .ruff_cache dist
