# Everything a person needs: `make train`, `make test`, `make check`. Needs Python >= 3.11 with venv and pip, and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRAINING := $(VENV)/.training
ALL := $(VENV)/.installed
# An index that has torch's CPU builds: without one pip takes, on Linux, the build for CUDA, of several GB.
TORCH_INDEX ?=
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt $(addprefix --extra-index-url ,$(TORCH_INDEX))
SOURCES := syncnorm launch tests benchmarks drills examples tools docs/site noxfile.py

.PHONY: help train test test-slow drill gpu lint types imports format check docs docs-links matrix release clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# Packages for training. Compiled when they are imported, since torch brings thousands of files that no training
# imports. A C compiler is used if there is one. The newest pip: it resolves the extras in a quarter of the time that
# Python's own takes. The stamp is made last, so that an interrupted install is done again; and bin/pip is there once
# pip itself is whole.
$(TRAINING): pyproject.toml constraints.txt hatch_build.py $(wildcard syncnorm/native/*.[ch])
	@echo "Installing torch and the trainer into $(VENV). pip names what it downloads, with its size.$(if $(TORCH_INDEX),, \
	On Linux, TORCH_INDEX=URL of an index with torch's CPU builds saves gigabytes.)"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP_INSTALL) --no-compile torch
	$(PIP_INSTALL) --no-compile --editable '.[train]'
	@echo "Installed: $$(du -sh $(VENV) | cut -f 1) in $(VENV)."
	touch $@

# The rest, on top: other frameworks that the tests run with, and tools.
$(ALL): $(TRAINING) pyproject.toml constraints.txt
	$(PIP_INSTALL) --quiet --no-compile --editable '.[all,integrations,dev]'
	touch $@

train: $(TRAINING)  ## Train on real data, statistics pooled over two workers
	@echo "Two workers train a small network: it shows that they compute what one does, not that they are faster."
	$(BIN)/syncnorm train configs/digits.yaml

# Tests start many processes: what the first of them compiles is kept, whatever the environment says.
test test-slow drill: export PYTHONDONTWRITEBYTECODE =

test: $(ALL)  ## Run the tests
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(ALL)  ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

drill: $(ALL)  ## Kill runs, nodes and wires again and again, and compare what comes of them; an hour
	$(BIN)/python -m drills.kill_drill
	$(BIN)/python -m pytest -s -m slow tests/launch/test_ray_drill.py tests/launch/test_sweep_drill.py tests/launch/test_elastic.py tests/launch/test_network.py

# With the torch that the machine has: it may be without a network.
gpu:  ## Run the tests of CUDA and take the figures of this machine's GPU; 9 minutes at most, into build/gpu
	$(PYTHON) -m benchmarks.gpu

lint: $(ALL)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(ALL)
	$(BIN)/basedpyright

imports: $(ALL)
	$(BIN)/lint-imports

format: $(ALL)  ## Format the code
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

check: lint types imports test  ## Everything that a change must pass: format, lint, types, imports, tests

# Names of torch and Python lead to pages that are written out in docs/site: no network is needed.
docs: $(ALL)  ## Build the documentation site into build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -n -q -c docs/site -d build/doctrees . build/docs
	@echo "The site begins at build/docs/index.html."

docs-links: $(ALL)  ## Ask the web whether the addresses in the documentation still answer
	$(BIN)/python -m sphinx -q -b linkcheck -c docs/site -d build/doctrees . build/docs-links

matrix: $(ALL)  ## Try the lowest, the pinned and the newest versions of what each extra brings; an hour
	$(BIN)/nox

release: $(ALL)  ## Build sdist and wheel into dist, check them, and write the version's notes
	rm -rf dist
	$(BIN)/python -m tools.release dist

clean:  ## Remove the environment and what tools left behind
	rm -rf $(VENV) dist .nox .pytest_cache .ruff_cache .hypothesis .import_linter_cache
