# make setup   a virtual environment in .venv with everything, development tools too
# make demo    FedIT and its baselines on the embedded default: no network, CPU, under five minutes
# make study   the tables of the papers in small: recipes/study_*.yaml, over three seeds; goes on where it was stopped
# make test    all tests
# make docs    the documentation as a site in build/site; its search needs a server: python3 -m http.server -d build/site
# make bench   every benchmark, its goal and its floor; all of it in runs/benchmarks.json too. For a quiet machine
# make test-federation   a real federation through faults of every kind, half an hour: as root, on Linux, with nginx
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 0
OUT ?= runs/demo

.PHONY: setup demo study test test-federation lint docs bench clean

setup: $(VENV)/.done

# torch first and by its exact version: pip then takes the CPU build where one is offered.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=23"
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,docs,trackers,flower,ray,privacy,compression,judge,harness,dashboard,playground]"
	touch $@

demo: setup
	rm -rf "$(OUT)"
	$(BIN)/flocktune run recipes/demo.yaml --out "$(OUT)" --seeds $(SEEDS)

study: setup
	$(BIN)/flocktune study recipes/study_fedit.yaml
	$(BIN)/flocktune study recipes/study_fedbiot.yaml

test: setup
	$(BIN)/python -m pytest

test-federation: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/federation/chaos.py -s

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m benchmarks --json runs/benchmarks.json

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
