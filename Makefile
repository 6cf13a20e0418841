# make train, make test (or test-fast, test-all), make lint (or format), make bench, make notebook, make docs: each first
# sets up .venv, from nothing but Python 3.11 or newer. make lowest, make newest: try the oldest and the newest versions
# that are allowed.
#
#   make train ARGS="--env-id brax/hopper --total-steps 100000"    what to train (any option of the script)
#   make train EXTRAS=dev,cuda                                     with JAX for an NVIDIA GPU
#   make test PYTHON=python3.12                                    which Python builds .venv

PYTHON ?= python3
EXTRAS ?= dev
ARGS ?=
PYTEST_ARGS ?=
# Compiling keeps one core busy, so two processes nearly halve the time of the tests. What shares compiled programs (the
# tests of one agent, those of one file) stays in one process.
PROCESSES ?= 2

BIN := .venv/bin
READY := .venv/.ready-$(EXTRAS)

.PHONY: help setup train test test-all test-fast lint format bench notebook docs lowest newest

help:
	@sed -n '/^PYTHON/q; s/^# \{0,1\}//p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxrl_dist needs Python 3.11 or newer, '$(PYTHON)' is: $$($(PYTHON) --version 2>&1);" \
	    "say which one to use, as in: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

train: $(READY)
	$(BIN)/python algorithms/actor_critic/tqc.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadgroup $(PYTEST_ARGS)

# Those, too, whose subject has not changed since they passed; writes tests/proofs.json.
test-all: $(READY)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadgroup --all --prove $(PYTEST_ARGS)

test-fast: $(READY)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadgroup -m "not slow" $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python experiments/throughput/run.py $(ARGS)

notebook: $(READY)
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

# The site, in site/: open site/index.html.
docs: .venv/.ready-docs
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/python -m mkdocs build --strict

.venv/.ready-docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

lowest newest: $(READY)
	$(BIN)/python scripts/try_versions.py $@ --python $(PYTHON) $(ARGS)
