# One command each; every target sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-s3 soak minis lint format bench bench-published clean

help: ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps trackeval
	@touch $@

setup: $(STAMP) ## Create .venv with everything pinned by constraints.txt

demo: $(STAMP) ## Make a small corpus, run the main job on it on CPU, show the tables and a picture
	$(BIN)/python jobs/demo.py

test: $(STAMP) ## Lint, types and tests (2 cores, no network, no GPU)
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/unit tests/golden tests/property
	$(BIN)/python -m pytest tests/integration tests/fault

test-slow: $(STAMP) ## Only the slow tests: deaths and lost nodes, long videos, full ViT-H goldens
	$(BIN)/python -m pytest -m slow

test-s3: $(STAMP) ## The tests that speak S3, against Ceph's gateway (Debian packages; see docs/STORAGE.md)
	PYTHON=$(BIN)/python infra/test_s3.sh

SOAK_MINUTES ?= 20

soak: $(STAMP) ## Random faults against real jobs for SOAK_MINUTES=20, verified after every round
	$(BIN)/python -W ignore -m tests.soak $(SOAK_MINUTES)

lint: $(STAMP) ## Ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Ratios against named baselines, one run; see docs/BENCHMARKS.md
	$(BIN)/python -m tests.benchmark

MINIS   ?= minis
TRAIN   ?= loop.device=auto
# Words for the detector and the segmenter alone: several loop.data_workers want reuse=1.
DETECTOR ?=

minis: $(STAMP) ## Train the small models again, into MINIS=folder; TRAIN="loop.precision=bf16 ..." for a GPU
	$(BIN)/python jobs/train_hmr2.py output="$(MINIS)/hmr2" loop.steps=71600 $(TRAIN)
	$(BIN)/python jobs/train_predictor.py output="$(MINIS)/predictor" jitter_deg=5 $(TRAIN)
	$(BIN)/python jobs/train_appearance.py output="$(MINIS)/appearance" $(TRAIN)
	$(BIN)/python jobs/train_detector.py output="$(MINIS)/detector" $(TRAIN) $(DETECTOR)
	$(BIN)/python jobs/train_detector.py output="$(MINIS)/segmenter" segment=true num_queries=16 \
		loop.learning_rate=5e-4 loop.warmup_steps=500 $(TRAIN) $(DETECTOR)
	@echo "To ship them: copy hmr2/hmr2.safetensors, predictor/pose_predictor.safetensors,"
	@echo "appearance/appearance.safetensors, detector/detector/ and segmenter/detector/ (as"
	@echo "segmenter/) of $(MINIS) to fourdh_batch/assets/mini, and write their digests and"
	@echo "figures ($(MINIS)/*/training.json) into CARDS.md there."

# The published tracker: its checkout (or REFERENCE=folder of one) and the packages it imports.
PHALP_URL    ?= https://github.com/brjathu/PHALP
PHALP_COMMIT := 96f7e6c09fb858ec3f597d59246c151ab4394bc3
REFERENCE    ?= .bench/PHALP
PEOPLE       ?= 3 10
FRAMES       ?= 10

bench-published: $(REFERENCE)/phalp $(STAMP) .bench/venv/.installed ## Our tracker beside the published one; PEOPLE="3 10 20" takes long
	$(BIN)/python tests/benchmark/reference_tracker.py --reference $(REFERENCE) \
	    --python .bench/venv/bin/python --recorded tests/data/tracking/full_seqA.npz \
	    --people $(PEOPLE) --frames $(FRAMES)

.bench/PHALP/phalp:
	@rm -rf .bench/PHALP && git init --quiet .bench/PHALP
	@git -C .bench/PHALP fetch --quiet --depth 1 $(PHALP_URL) $(PHALP_COMMIT) || { echo \
	    "cannot get $(PHALP_URL) from here: make bench-published REFERENCE=folder of a checkout of $(PHALP_COMMIT)" >&2; exit 1; }
	git -C .bench/PHALP checkout --quiet FETCH_HEAD

%/phalp:
	@echo "$*: not a checkout of PHALP, there is no folder phalp in it (REFERENCE=)" >&2; exit 1

.bench/venv/.installed: constraints.txt
	$(PYTHON) -m venv .bench/venv
	.bench/venv/bin/python -m pip install --quiet --constraint constraints.txt \
	    torch scipy omegaconf scikit-learn==1.9.1 einops==0.8.2
	@touch $@

clean: ## Remove the environment and everything made
	rm -rf $(VENV) .bench demo_output .pytest_cache .mypy_cache .ruff_cache dist
