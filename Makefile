# Needs Python 3.11 or newer (make PYTHON=/path/to/python3.12 ...), make and a C++ compiler; the rest goes into .venv.
.DEFAULT_GOAL := help
.PHONY: help setup format check test test-unit browser quickstart clean distclean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The default build of torch brings gigabytes of CUDA libraries. Without a GPU, the local version "+cpu" can never do so.
TORCH_VERSION := 2.13.0
ifeq ($(shell uname -s),Linux)
TORCH ?= torch==$(TORCH_VERSION)$(if $(shell command -v nvidia-smi 2>/dev/null),,+cpu)
else
TORCH ?= torch==$(TORCH_VERSION)
endif

# pip compiles what it has installed on one core, half of its time. Some packages hold templates that are no Python yet, at
# which this fails in the end, and nothing else does.
COMPILE := $(BIN)/python -m compileall -qq

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED)  ## create .venv and install everything into it

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: Python 3.11 or newer is needed; "$(PYTHON)" is' "$$($(PYTHON) --version 2>&1)." \
	       'Name another one: make PYTHON=/path/to/python3.12'; exit 1; }
	@command -v g++ >/dev/null || command -v c++ >/dev/null || { \
	  echo 'error: no C++ compiler (g++ or c++) found. DeepSpeed builds its CPU communication with one:' \
	       'install your system'"'"'s g++ (on Debian and Ubuntu the package g++)'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile '$(TORCH)' || { \
	  echo 'error: pip could not install $(TORCH) (its own message is above). Where it found no such version, either' \
	       'add the index of the CPU wheels of PyTorch, named on pytorch.org/get-started, as PIP_EXTRA_INDEX_URL,' \
	       'or take the default build: make TORCH=torch==$(TORCH_VERSION)'; exit 1; }
	$(COMPILE) $(VENV) & $(BIN)/python -m pip install --quiet --no-compile --editable '.[ray,train,eval,dev]'; \
	  status=$$?; wait; exit $$status
	$(COMPILE) --workers 0 $(VENV) || true
	@touch $@

format: $(INSTALLED)  ## rewrite the sources in the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(INSTALLED)  ## lint, format, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layering.py

# Tests of jobs wait a lot for processes to start and to end: three at a time keep two cores busy. A file's tests share
# fixtures. In the order of tests/conftest.py the long files come early, so that none waits long for another at the end.
test: $(INSTALLED) $(if $(CI),browser)  ## every test
	@# Built alone it takes a minute, once; by the first test that trains, beside two processes of others, up to ten.
	@DS_ACCELERATOR=cpu $(BIN)/python -c 'from pipelines.training.compiler import build_cpu_operator as b; b()'
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# The page is tested in a browser. Only a CI machine gets one this way; elsewhere that test says what it misses.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  timeout 300 sh -c 'apt-get update && apt-get install --yes --no-install-recommends chromium' >/dev/null 2>&1 || \
	  echo 'no Chromium could be installed: the test of the page will be skipped'

test-unit: $(INSTALLED)  ## the tests that start neither Ray nor an S3 server
	$(BIN)/python -m pytest -m 'not ray and not s3'

quickstart: $(INSTALLED)  ## a corpus to answers on this machine, with a report in outputs/
	$(BIN)/python jobs/quickstart.py

clean:  ## remove what the targets above wrote, except .venv
	rm -rf outputs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## and .venv
	rm -rf $(VENV) .cache
