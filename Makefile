# Everything a person needs: `make train`, `make test`, `make check`. Needs Python >= 3.11 with venv and pip, and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := syncnorm launch tests benchmarks drills examples

.PHONY: help train test test-slow drill lint types imports format check clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,report,tensorboard,ray,integrations,dev]'
	touch $@

train: $(INSTALLED)  ## Train on real data, statistics pooled over two workers
	$(BIN)/syncnorm train configs/digits.yaml

test: $(INSTALLED)  ## Run the tests
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadgroup --no-loadscope-reorder

test-slow: $(INSTALLED)  ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

drill: $(INSTALLED)  ## Kill runs, nodes and wires again and again, and compare what comes of them; an hour
	$(BIN)/python -m drills.kill_drill
	$(BIN)/python -m pytest -s -m slow tests/launch/test_ray_drill.py tests/launch/test_elastic.py tests/launch/test_network.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(INSTALLED)
	$(BIN)/basedpyright

imports: $(INSTALLED)
	$(BIN)/lint-imports

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

check: lint types imports test  ## Everything that a change must pass: format, lint, types, imports, tests

clean:  ## Remove the environment and what tools left behind
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
