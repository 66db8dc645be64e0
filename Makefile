# The front door. `make help` is made from the ## comments below.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
  && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2
MODE ?= auto
PORT ?= 8000
MODEL ?=
export PYTHONUTF8 := 1

.DEFAULT_GOAL := help
.PHONY: help setup validate image shell serve test test-slow lint doctor facts list compile selftest bench bench-train bench-export \
  dynamic-curve sanitize snapshot uninstall verify-rollback report lock lock-image check-locks image-debian schemas clean

help: ## Show every target with its purpose
	@grep -hE '^[a-z][a-z-]*:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: ## Make the virtual environment (done by the others when needed)
ifeq ($(strip $(PYTHON)),)
	@echo "sparkproof set-up: no Python 3.11 to 3.13 was found: sudo apt install python3 python3-venv" >&2; exit 2
else
	@$(PYTHON) scripts/setup_env.py $(VENV)
endif

validate: setup ## Judge this machine: smoke without a GPU, quick with one (MODE=container|host|auto, ARGS='--profile full')
	@$(BIN)/sparkproof validate --mode $(MODE) $(ARGS)

image: setup ## Build the image for this machine with Docker or Podman (ARGS='--target serve': vLLM's)
	@$(BIN)/sparkproof image $(ARGS)

shell: setup ## A shell in the image, with the GPU, and this folder at /work
	@$(BIN)/sparkproof shell $(ARGS)

serve: setup ## Serve a model from the image on 127.0.0.1 (MODEL=folder or hub id, PORT=8000)
	@$(if $(MODEL),,echo "error: say which model: make serve MODEL=merged" >&2; exit 2;) \
	  $(BIN)/sparkproof serve --port $(PORT) $(MODEL) $(ARGS)

# A worker a core and a thread a worker: with torch's threads on top, two workers on two cores took 151 s for what takes 66.
test test-slow: export OMP_NUM_THREADS ?= 1

# The kernels' tests on their own first: without a GPU their whole process interprets, which the others' must not. Among others
# each of their files has a process of its own, in every worker that meets it.
test: setup lint ## Run the project's own tests, linter and type checker
	$(if $(ARGS),,$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests/kernels)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(or $(ARGS),--ignore tests/kernels)

test-slow: setup ## Run the tests that take minutes
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(ARGS)

lint: setup ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

doctor: setup ## Find known failures of this machine, with their fixes
	@$(BIN)/sparkproof doctor $(ARGS)

facts: setup ## Show what was read of this machine
	@$(BIN)/sparkproof facts $(ARGS)

list: setup ## List the cases of a profile
	@$(BIN)/sparkproof list $(ARGS)

compile: setup ## Compile every kernel for sm_121 and hold it to GB10's limits (no GPU needed)
	@$(BIN)/sparkproof compile $(ARGS)

selftest: setup ## Prove that the kernel tests, the learning gate and the memory watchdog catch planted faults
	@$(BIN)/sparkproof selftest memory
	@$(BIN)/sparkproof selftest train
	@$(BIN)/sparkproof selftest export
	@$(BIN)/sparkproof selftest kernels $(ARGS)

bench: setup ## Time every op against transformers, torch.compile, Liger and Unsloth (needs a GPU)
	@$(BIN)/sparkproof bench ops $(ARGS)

bench-train: setup ## Time a QLoRA step of transformers, Liger, Unsloth and sparktune (needs a GPU)
	@$(BIN)/sparkproof bench train $(ARGS)

bench-export: setup ## Time writing and reading every export format, with proof of the backend (ARGS='--formats gguf')
	@$(BIN)/sparkproof bench export $(ARGS)

dynamic-curve: setup ## Draw KL against bytes of dynamic quantisation on SmolLM2-135M (up to an hour, and llama.cpp's tools once)
	$(BIN)/python scripts/dynamic_curve.py --out reports/published/dynamic/smollm2 $(ARGS)

sanitize: setup ## Look for memory errors and races in every kernel with NVIDIA's compute-sanitizer (needs a GPU)
	@$(BIN)/python scripts/sanitize.py $(ARGS)

snapshot: ## Record this machine before anything is installed (needs no set-up)
	@$(PYTHON) scripts/way_back.py $(VENV) snapshot $(ARGS)

uninstall: ## Show what sparkproof made and what came since the snapshot, ask, and take it off
	@$(PYTHON) scripts/way_back.py $(VENV) uninstall $(ARGS)

verify-rollback: ## Prove that this machine is as the snapshot recorded it
	@$(PYTHON) scripts/way_back.py $(VENV) verify-rollback $(ARGS)

report: setup ## Rebuild the views of the latest run
	@$(BIN)/sparkproof report $(ARGS)

lock: ## Regenerate the hash lock (needs uv)
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS uv pip compile pyproject.toml requirements/torch.in --extra embedded --extra dev \
	  --universal --python-version 3.11 --generate-hashes --override requirements/overrides.txt --no-annotate \
	  --custom-compile-command "make lock" -o requirements/lock.txt

lock-image: setup ## Regenerate the image's locks, for both architectures
	$(BIN)/python -m sparkproof.locks compile

check-locks: setup ## Prove from wheels on the index that the image's locks fit a Spark (ARGS=--deep reads them whole)
	$(BIN)/python -m sparkproof.locks check $(ARGS)

image-debian: setup ## Build and try the image on a Debian base with buildah, where there is no Docker engine (root, an hour)
	scripts/image_debian.sh $(ARGS)

schemas: setup ## Regenerate the committed JSON Schemas
	@$(BIN)/sparkproof schemas

clean: ## Remove the virtual environment and caches of this checkout (reports stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
