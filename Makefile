# Set-up is done once, and again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-hosts test-kube bench-predict lint format clean help
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

demo: $(READY)  ## a made-up world to a height map and its report, in runs/demo
	$(BIN)/python -m pipelines.demo

# Two processes: each takes up to 6 GB, and starts workers of its own.
test: $(READY)  ## all tests, with coverage of the library
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term

test-hosts: $(READY)  ## several hosts, and what may happen to each (needs root, Linux; minutes)
	AEHEIGHT_TEST_HOSTS=1 $(BIN)/python -m pytest tests/hosts -s

test-kube: $(READY)  ## a whole run on a cluster (KUBECONFIG), its pods lost one after the other
	AEHEIGHT_TEST_KUBE=1 $(BIN)/python -m pytest tests/kube -s

bench-predict: $(READY)  ## prediction beside its bounds: the bare network, map_overlap, a million shards
	$(BIN)/python -m tests.benchmarks.predict
	$(BIN)/python -m tests.benchmarks.overlap
	$(BIN)/python -m tests.benchmarks.scale

lint: $(READY)  ## style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## put the source into its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the results of runs (not the set-up)
	rm -rf runs

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "aeheight needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): PyTorch is large, this takes some minutes the first time."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
# Only the definitions of its resources are read (tests/test_deploy_operator.py): no part of the environment.
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/dask-operator --upgrade dask-kubernetes==2026.3.0
	@touch $@
