# Every target below installs what it needs into .venv first and does nothing twice.
#   make run ARGS="experiment=resid_mlp1 seed=3"     make test ARGS="-k sigmoid"     make install PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
JOBS ?= auto
# One thread per test process: the tests run side by side, and sums in one order give the same bits everywhere.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4

INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-dev run test test-all check lint type format recovery bench constraints clean clean-all

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with pinned dependencies and spd-run

install-dev: $(INSTALLED_DEV) ## the same with test and lint tools and the pre-commit hooks

run: $(INSTALLED) ## install if needed, then spd-run $(ARGS); without ARGS: tms_5-2
	$(BIN)/spd-run $(ARGS)

test: $(INSTALLED_DEV) ## the fast tests (several minutes)
	$(PYTEST) -m "not slow and not recovery" $(ARGS)

test-all: $(INSTALLED_DEV) ## all tests but the recovery tables (half an hour to an hour)
	$(PYTEST) -m "not recovery" $(ARGS)

check: lint type ## everything that must pass before a commit: lint, format, types, direction of imports

lint: $(INSTALLED_DEV) ## ruff, formatting, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

type: $(INSTALLED_DEV) ## mypy --strict
	$(BIN)/mypy

format: $(INSTALLED_DEV) ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

recovery: $(INSTALLED) ## train every toy over its seeds and write the table of known answers found
	$(BIN)/python -m benchmarks.recovery $(ARGS)

bench: $(INSTALLED) ## milliseconds per training step, beside a plain one and the least the machine allows
	$(BIN)/python -m benchmarks.step_time $(ARGS)

constraints: $(INSTALLED_DEV) ## write the installed versions to constraints.txt
	$(PIP) freeze --all --exclude-editable --exclude pip --exclude wheel | sed 's/+.*//' | LC_ALL=C sort -f > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean: ## remove caches and build products; outputs/ and .venv stay
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## remove .venv as well
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "spd_hydra needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	    "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: its pin is then met before any other package can ask for a newer build.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	$(BIN)/python -m spd_hydra.compiling
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@if git rev-parse --git-dir >/dev/null 2>&1 && $(BIN)/pre-commit install; then :; else \
	  echo "pre-commit hooks were not installed; run 'make check' before you commit."; fi
	@touch $@
