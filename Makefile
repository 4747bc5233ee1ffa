# `make` lists the targets. With an active virtual environment (VIRTUAL_ENV) that one is used, else .venv is made here.

VENV   := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
PYTHON ?= python3
BIN    := $(VENV)/bin
BASE   := $(VENV)/.imagemill-installed
DEV    := $(VENV)/.imagemill-installed-dev
PARALLEL := --numprocesses auto --dist worksteal
PATH   := $(BIN):$(PATH)
export PATH

.DEFAULT_GOAL := help
.PHONY: help demo install test test-unit test-large check format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BASE)  ## install imagemill and classify the images that ship with it
	$(BIN)/imagemill demo

install: $(DEV)  ## install imagemill and what the tests need

test: $(DEV)  ## install what the tests need and run them
	$(BIN)/python -m pytest $(PARALLEL)

test-unit: $(DEV)  ## the tests that need no process, server or whole network: about a minute
	$(BIN)/python -m pytest $(PARALLEL) -m 'unit and not large and not gpu' --ignore-glob='*/test_torch_*' --ignore-glob='*/test_cuda*'

test-large: $(DEV)  ## the tests that take gigabytes or long, before a release
	$(BIN)/python -m pytest -m large

check: $(DEV)  ## what CI runs: lint, format, types, import directions, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

format: $(DEV)  ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BASE)  ## measure this machine on synthetic images
	$(BIN)/imagemill bench --synthetic --model efficientnet_lite0

clean:  ## remove caches, builds and the demo's output; .venv stays
	rm -rf build dist src/*.egg-info imagemill-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: installed again only where pyproject.toml is newer.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("imagemill needs Python 3.11 or newer; name one: make PYTHON=python3.11 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(BASE)
