# Two commands are all the set-up: `make run` and `make test`. CONTRIBUTING.md says more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Symlinked packages need the plain .pth form of editable installs (docs/design.md).
INSTALL := $(PIP) install --config-settings editable_mode=compat

.PHONY: run test real check types unit wheel clean

run: $(VENV)/core.done  ## install the core and simulate the main job
	$(BIN)/simrl run --policy rlhfless --nodes 20

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "simrl needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/core.done: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/dev.done: pyproject.toml $(VENV)/core.done
	$(INSTALL) -e '.[dev]'
	touch $@

test: check types unit  ## everything that must hold

check: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.done
	$(BIN)/mypy

unit: $(VENV)/dev.done
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
