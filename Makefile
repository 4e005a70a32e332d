# Two commands: `make pretrain` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONFIG ?= configs/run/quickstart.yaml
ARGS ?=
# A run's folder: folder=... or name=... in ARGS, else the quick start's.
RUN = $(or $(patsubst folder=%,%,$(filter folder=%,$(ARGS))),runs/$(or $(patsubst name=%,%,$(filter name=%,$(ARGS))),quickstart))

.PHONY: pretrain test test-slurm check bench format venv docs clean

pretrain: $(VENV)/ready ## prepare data, train, evaluate, sample
	$(BIN)/megatron-eso data prepare stdlib --out runs/data/stdlib --sequence-length 128 --vocab-size 2048
	$(BIN)/megatron-eso train $(CONFIG) $(ARGS)
	$(BIN)/megatron-eso eval $(RUN) runs/data/stdlib/validation --rows 32 --orders 4
	$(BIN)/megatron-eso sample $(RUN) --prompt "def " --num-samples 2
	@echo "run folder: $(RUN)  (tensorboard --logdir $(RUN)/tensorboard shows the curves)"

test: $(VENV)/ready ## all tests but those on a real Slurm cluster
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/resilience -q -m "not slurm" -n 2 --dist loadfile --durations=20
	$(BIN)/python -m pytest tests/resilience -q --durations=5

test-slurm: $(VENV)/ready ## the tests on a real Slurm cluster on this machine (installs its daemons)
	bash tools/install_slurm.sh
	$(BIN)/python -m pytest tests/slurm_cluster -q -n 3 --dist loadfile --durations=5

check: $(VENV)/ready ## format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests -q -m "not slow and not slurm"

bench: $(VENV)/ready ## speed and memory, ratios measured in one run
	$(BIN)/python -m tools.bench

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/ready ## docs/config.md from the configuration's docstrings
	$(BIN)/python -m tools.config_docs

venv: $(VENV)/ready

# torch is pinned first on a machine without a GPU: a looser request would bring the CUDA build.
# mosaicml-streaming goes without its dependencies: it pins numpy < 2.2 and torchvision.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	nvidia-smi >/dev/null 2>&1 || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[train,data,plots,dev]'
	$(BIN)/pip install -q --no-deps mosaicml-streaming==0.13.0
	touch $@

clean: ## remove the virtual environment and caches, not the runs
	rm -rf $(VENV) .pytest_cache .ruff_cache
