# Everything a developer or operator does here, one target each; `make help` lists them.
# `setup` is repeated only when pyproject.toml or requirements.lock has changed, so every target can
# depend on it. pip reads the environment's own settings (index, proxy, certificates).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Torch's extension loader calls ninja, which is a pip package: it must be found on PATH.
export PATH := $(CURDIR)/$(BIN):$(CURDIR)/var/tools/bin:$(PATH)

# Progress bars would fill a log with their redrawn lines, so they need a terminal.
ifneq ($(shell test -t 2 && echo terminal),terminal)
export TQDM_DISABLE := 1
endif

# Tests run tiny models: two threads show races between threads, more would only wait for each other.
TEST_THREADS ?= 2
FUZZ_SECONDS ?= 20
# Arguments for pytest, for example: make test ARGS='tests/engine -k preempt'
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup model prometheus demo serve train-adapter test test-gpu fuzz lint house proto bench bench-peft \
        bench-kernels bench-train bench-adapters bench-paper bench-gpu figures lock clean distclean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the locked versions of everything (repeated only when they change)

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Loraplex needs Python 3.11 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null \
	  || echo "note: no C++ compiler found; the slower reference kernels will be used" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked dependencies into $(VENV); the first time takes minutes."
	$(BIN)/python -m pip install -qq --constraint requirements.lock --editable '.[dev]'
	@touch $@

model: $(READY) ## Fetch the default model's weights into var/cache (93 MB, once)
	@$(BIN)/python -c 'from pathlib import Path; from loraplex_model.checkpoints.default_model import ensure_default_model; ensure_default_model(Path("var/cache"))'

prometheus: ## Find Prometheus or unpack Debian's package below var/tools (for one test, which skips without it)
	@scripts/fetch-prometheus

demo: setup model ## Set up, start a server, stream the base and two adapters from one batch, check, stop
	$(BIN)/python examples/demo.py

serve: setup model ## Start the server on the default model (SERVE_ARGS='--port 50051 ...')
	$(BIN)/loraplex-server serve $(SERVE_ARGS)

train-adapter: setup model ## Train an adapter on DATA=file.jsonl as NAME=name (ARGS='--lr 1e-4 --serve localhost:50051'); without DATA, show what training does
ifdef DATA
	@test -n "$(NAME)" || { echo "error: name the adapter: make train-adapter DATA=$(DATA) NAME=..." >&2; exit 2; }
	$(BIN)/python -m loraplex_training run --data "$(DATA)" --name "$(NAME)" --store var/store $(ARGS)
else
	$(BIN)/python examples/train_adapter.py $(ARGS)
endif

test: setup model prometheus ## Set up and run the test suite (ARGS='tests/engine -k preempt')
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -rs $(ARGS)

test-gpu: setup model ## Run the tests that need a CUDA device
	@$(BIN)/python scripts/require_cuda.py
	$(BIN)/python -m pytest -m gpu $(ARGS)

fuzz: setup ## Fuzz the validation of adapters for a minute, from the committed corpus on (FUZZ_SECONDS=20 a target)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || { echo "atheris has no wheel for this machine" >&2; exit 1; }
	for target in config header adapter; do \
	  PYTHONPATH=tests $(BIN)/python tests/fuzz/run.py $$target $(FUZZ_SECONDS) || exit 1; done

lint: setup ## Check formatting, style, types, the layers, the protos and the generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd proto && buf lint
	$(BIN)/python proto/generate.py --check

house: ## Measure how the code is laid out: rooms, wide folders, doubled names, long files
	@$(PYTHON) scripts/house.py $(ARGS)

proto: setup ## Generate client/loraplex/v1 from proto/
	$(BIN)/python proto/generate.py

bench: setup model ## Measure this server: base and adapters, by popularity and concurrency
	$(BIN)/python bench/bench_server.py $(ARGS)

bench-peft: setup model ## Compare with PEFT on the same NF4 base, in one run
	$(BIN)/python bench/bench_peft.py $(ARGS)

bench-kernels: setup ## Compare the NF4 product with bitsandbytes' and torch's
	$(BIN)/python bench/bench_kernels.py $(ARGS)

bench-train: setup model ## Compare training with PEFT's on the same NF4 base, and four jobs in one pass with four in turn
	$(BIN)/python bench/bench_train.py $(ARGS)

bench-adapters: setup model ## Measure the life of adapters: loads, replacement, merges, thousands, kill -9
	$(BIN)/python bench/bench_adapters.py $(ARGS)

bench-paper: setup ## Try the papers' claims on a small model: 4-bit formats, ranks, budgets, AdaLoRA
	@failed=; for bench in quantisation rank adalora; do \
	  PYTHONPATH=bench OMP_NUM_THREADS=1 $(BIN)/python -m paper.$$bench $(ARGS) || failed="$$failed $$bench"; done; \
	if [ -n "$$failed" ]; then echo "relations do not hold:$$failed" >&2; exit 1; fi

bench-gpu: setup model ## Compare with PEFT on a CUDA device
	@$(BIN)/python scripts/require_cuda.py
	$(BIN)/python bench/bench_peft.py --device cuda $(ARGS)

figures: setup ## Draw the figures of docs/ anew, from the server's own quantiser and what bench-paper gave
	$(BIN)/python docs/figures/draw.py
	$(BIN)/python docs/figures/draw_paper.py

lock: setup ## Write requirements.lock anew from what .venv holds
	scripts/write-lock $(BIN)/python

clean: ## Remove caches and build output (keeps .venv and var/)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## Also remove .venv and var/: adapters stored below var/ are lost
	rm -rf $(VENV) var
