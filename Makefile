# Needs python3 (3.11 or newer), make and git. The first target that needs .venv creates it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Two processes more than cores, because tests wait for servers about a third of the time. The tests of a file share servers.
PYTEST := $(BIN)/pytest -n $$(($$(nproc) + 2)) --dist loadfile --no-loadscope-reorder

# Empty: the prompt of `hunyuan demo`.
PROMPT ?=
DURATION ?= 5
RESOLUTION ?= 720p
TRAIN_MINUTES ?= 240
export PROMPT
# A test run starts hundreds of processes. Without bytecode on disk, each of them compiles every module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(VENV)/.local ## Render demo.mp4 end to end with the demo model (PROMPT=... DURATION=5..10 RESOLUTION=720p|1080p)
	$(BIN)/hunyuan demo $${PROMPT:+"$$PROMPT"} --duration '$(DURATION)' --resolution '$(RESOLUTION)' --output demo.mp4

.PHONY: serve
serve: $(VENV)/.local ## Start the server on HUNYUAN_PORT (8000) with the model at HUNYUAN_MODEL_PATH, or with the demo model
	exec $(BIN)/hunyuan serve

.PHONY: test
test: lint ## Lint, type-check and run every test that is not marked `full`
	$(PYTEST) -m 'not full'

.PHONY: test-full
test-full: lint ## As `make test`, with the tests marked `full` as well: whole services, faults, sizes and backends
	$(PYTEST)

.PHONY: unit
unit: $(VENV)/.dev ## Run the tests that start no server process and load no model, in seconds
	$(BIN)/pytest -n $$(nproc) --dist loadfile tests/unit

.PHONY: test-faults
test-faults: $(VENV)/.dev ## Inject 22 kinds of fault at random during 300 tasks, about half an hour (FAULTS="--fault-seed 7" repeats a run)
	$(BIN)/pytest tests/faults --faults=full $(FAULTS)

.PHONY: images-check
images-check: $(VENV)/.dev ## Build both images with buildah on a Debian base and render the demo in them; root, 20 minutes, 20 GB
	$(BIN)/pytest -p no:xdist --capture=no tests/infra/images_check.py

.PHONY: bench-gpu
bench-gpu: $(VENV)/.local ## Measure the model at its real size on this GPU (BENCH="--stock --vram-limit 12"); needs a CUDA build of torch
	$(BIN)/python -m benchmarks.gpu $(BENCH)

.PHONY: bench-queue
bench-queue: $(VENV)/.dev ## Measure the job queue with an empty table and with a million completed jobs (BENCH="--history 1000000")
	$(BIN)/python -m benchmarks.queue $(BENCH)

.PHONY: bench-http
bench-http: $(VENV)/.dev ## Measure GET /status and GET /health beside a bare FastAPI route (BENCH="--seconds 4 --rounds 5")
	$(BIN)/python -m benchmarks.http $(BENCH)

.PHONY: picture
picture: $(VENV)/.dev ## Take docs/demo.png and docs/page.png again, of a server with the demo model; needs chromium
	$(BIN)/python -m tests.support.page_picture docs

.PHONY: eval-demo
eval-demo: $(VENV)/.dev ## Score the demo model on 200 held-out prompts, by pixels, about half an hour (EVAL="--prompts 40 --sheet failures.png")
	$(BIN)/python -m tools.demo_model.evaluation.evaluate $(EVAL)

.PHONY: lint
lint: $(VENV)/.dev ## ruff, mypy --strict, import-linter, bandit
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target types style

.PHONY: types
types:
	$(BIN)/mypy --num-workers 2

.PHONY: style
style:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive contract handler hunyuan shim storage tools

.PHONY: audit
audit: $(VENV)/.dev ## Look up every pinned package in the advisory database; fails if a lookup fails
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement constraints.txt

.PHONY: format
format: $(VENV)/.dev ## Format the code and apply the fixes that ruff knows
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: constraints
constraints: ## Pin the newest releases that pyproject.toml allows in constraints.txt (keeps torch)
	rm -rf $(VENV)/renew && $(PYTHON) -m venv $(VENV)/renew
	$(VENV)/renew/bin/pip install --quiet '$(shell grep ^torch== constraints.txt)' '.[dev]'
	$(VENV)/renew/bin/pip freeze --all | grep -vE '^(pip|setuptools|hunyuan-video-service)\b' | sed -E 's/\+[a-z0-9]+$$//' > constraints.txt
	rm -rf $(VENV)/renew

.PHONY: constraints-cuda
constraints-cuda: ## Pin the CUDA packages of the worker's image in constraints-cuda.txt (PYTHON=python3.12)
	$(PYTHON) -m tools.cuda_constraints

.PHONY: api-page
api-page: $(VENV)/.dev ## Write docs/api.md from the server's OpenAPI document
	$(BIN)/python -m tools.api_page

.PHONY: settings-page
settings-page: $(VENV)/.dev ## Write the tables of docs/settings.md from the settings classes
	$(BIN)/python -m tools.settings_page

.PHONY: runpod-schema
runpod-schema: $(VENV)/.dev ## Compare RunPod's published API with infra/runpod/api.schema.json; needs the internet
	$(BIN)/python -m tools.runpod_schema

.PHONY: plan-page
plan-page: $(VENV)/.dev ## Write the tables of the plan in docs/performance.md
	$(BIN)/python -m tools.plan_page

.PHONY: train-demo
train-demo: $(VENV)/.dev ## Train the demo model again, hours on two cores; goes on from .cache/demo-model (TRAIN_MINUTES=240 TRAIN="--from handler/video_model/demo_weights")
	$(BIN)/python -m tools.demo_model.train_decoder --minutes 30 --threads $$(nproc)
	$(BIN)/python -m tools.demo_model.train_transformer --minutes $(TRAIN_MINUTES) --threads $$(nproc) $(TRAIN)
	$(BIN)/python -m tools.demo_model.assemble

.PHONY: release
release: $(VENV)/.dev ## Build the wheel and the source archive into dist/ and check them (RELEASE=--draft if the changelog has no date yet)
	$(BIN)/python -m tools.release $(RELEASE)

.PHONY: clean
clean: ## Remove what the other targets created
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache dist demo.mp4

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'This project needs Python 3.11 or newer: pass one with make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.local: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Setting up $(VENV) (once, a minute or so) ...'
	$(PIP) --editable '.[local]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Setting up $(VENV) for development (once, a minute or two) ...'
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.local
