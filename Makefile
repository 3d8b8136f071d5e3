# make demo | check | test | lint: all use one .venv, made by the first of them; each installs what it lacks, as
# constraints.txt pins it, and runs. Python 3.10 to 3.13.
#
#   PYTHON=python3.12   the Python that makes .venv
#   VENV=none           no .venv and no install: run PYTHON as it is, which has torch (a GPU host without a network)
#   PIP_ARGS=...        more arguments for pip, such as another package index
#   ARGS=...            more arguments for the command: make demo ARGS="--steps 20", make test ARGS="-k combine"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=

ifeq ($(VENV),none)
PY := $(PYTHON)
DEMO :=
READY :=
CLIENTS :=
TOOLS_PY := $(PYTHON)
TOOLS :=
DOCS_PY := $(PYTHON)
DOCS :=
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
DEMO := $(VENV)/demo-ready
READY := $(VENV)/ready
CLIENTS := $(VENV)/clients/ready
TOOLS_PY := $(VENV)/package/bin/python
TOOLS := $(VENV)/package/ready
DOCS_PY := $(VENV)/docs/bin/python
DOCS := $(VENV)/docs/ready
endif

PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)
FIND = 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))'
HAVE = $(PY) -c $(FIND)

.PHONY: help demo check test lint format chart docs package sanitize clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small Mixture-of-Experts model on four local ranks (about a minute, once torch is there)"
	@echo "make check   format, lint, types, and the tests that need neither ranks nor the emulator (under a minute)"
	@echo "make test    run all tests, with coverage"
	@echo "make lint    ruff format, ruff check, clang-format, mypy --strict"
	@echo "make format  write Python and device code as lint wants them"
	@echo "make chart   draw the chart of the README from the measurements in benchmarks/"
	@echo "make docs    build the documentation site into site/, and refuse links that lead nowhere (Python 3.11 or newer)"
	@echo "make package  build the sdist and the wheel into dist/, and check what an index would show of them"
	@echo "make sanitize  compute-sanitizer over the tests of the kernels; needs a GPU"
	@echo "make clean   remove .venv and what the others leave behind"

demo: $(DEMO)
	$(PY) -m tokenferry demo $(ARGS)

# Ranks are processes that the tests fork: each leaves a coverage file of its own, which `combine` puts together. So
# does each process of pytest; those of a file run in one, since they share what they have measured or compiled. Files
# are dealt out in the order of their names, in which tests/unit, with many short ones, comes last: the processes end
# together. xdist would leave the files with few tests for the end, and those are the long ones.
test: $(READY) $(CLIENTS)
	@if command -v g++ > /dev/null; then floor=; else floor=--fail-under=90; \
	    echo "make test: there is no g++, so the emulator does not run the kernels, and the CUDA backend is not covered"; fi; \
	if $(HAVE) xdist; then workers="-n auto --dist loadfile --no-loadscope-reorder"; fi; \
	if $(HAVE) coverage; then set -ex; \
	    $(PY) -m coverage erase; \
	    $(PY) -m coverage run -m pytest $$workers $(ARGS); \
	    $(PY) -m coverage combine --quiet; \
	    $(PY) -m coverage report $$floor; \
	else \
	    echo "make test: $(PY) has no module named coverage: the tests run, their coverage is not measured"; \
	    set -ex; $(PY) -m pytest $$workers $(ARGS); \
	fi

CLANG_FORMAT = $(PY) -c 'import clang_format; clang_format.clang_format()'
DEVICE_CODE = $(shell find src tests -name '*.cuh' -o -name '*.h')

lint: $(READY)
	@$(HAVE) ruff mypy clang_format || { echo "make lint: $(PY) has not all of ruff, mypy and clang-format; install them, or leave out VENV=none"; exit 1; }
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(DEVICE_CODE)
	@! grep -nE '^.{121,}' $(DEVICE_CODE) || { echo "make lint: lines longer than 120 characters; clang-format leaves comments alone"; exit 1; }
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(DEVICE_CODE)

# The inner loop: what an edit is most likely to have broken.
check: lint
	$(PY) -m pytest tests/unit tests/docs -k 'not code_runs and not several_ranks' $(ARGS)

chart: $(DEMO)
	$(PY) benchmarks/chart.py

docs: $(DOCS)
	@$(DOCS_PY) -c $(FIND) mkdocs material mkdocstrings || { echo "make docs: $(DOCS_PY) has not all of mkdocs-material, mkdocstrings and mkdocstrings-python; install them, or leave out VENV=none"; exit 1; }
	PATH="$(dir $(DOCS_PY)):$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs build

package: $(TOOLS)
	@$(TOOLS_PY) -c $(FIND) build twine || { echo "make package: $(TOOLS_PY) has not both of build and twine; install them, or leave out VENV=none"; exit 1; }
	rm -rf dist
	$(TOOLS_PY) -m build --no-isolation
	$(TOOLS_PY) -m twine check --strict dist/*

sanitize: $(READY)
	$(PY) tests/cuda/sanitize.py $(ARGS)

clean:
	rm -rf .venv build dist site src/tokenferry.egg-info demo-out .coverage .coverage.* .hypothesis .pytest_cache .mypy_cache .ruff_cache

# For the tests only: clients that cannot be installed beside the others, each with what it imports. Megatron-Core asks
# for Python 3.12, and runs on 3.11. Without one of them its test is skipped.
CLIENT = $(PY) -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --only-binary :all: \
    --ignore-requires-python $(PIP_ARGS) --target $(VENV)/clients

# What builds the package, and the site, have a .venv of their own: they need neither torch nor what the tests need.
ifneq ($(VENV),none)
$(VENV)/docs/ready: constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"make docs needs Python 3.11 or newer, this is {v[0]}.{v[1]}")'
	$(PYTHON) -m venv $(VENV)/docs
	$(DOCS_PY) -m pip --disable-pip-version-check install --quiet --no-compile \
	    --constraint constraints.txt $(PIP_ARGS) mkdocs-material mkdocstrings mkdocstrings-python ruff
	touch $@

$(VENV)/package/ready: constraints.txt
	$(PYTHON) -m venv $(VENV)/package
	$(TOOLS_PY) -m pip --disable-pip-version-check install --quiet --no-compile \
	    --constraint constraints.txt $(PIP_ARGS) setuptools wheel build twine
	touch $@

# What the demo uses; torch is nearly all of it.
$(VENV)/demo-ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python 3.10 or newer is needed, this is {v[0]}.{v[1]}")'
	@echo "making $(VENV), and installing torch, matplotlib and rich into it: once, and gigabytes if your index has a CUDA build of torch"
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation --editable '.[cli,plots]'
	@du -sh $(VENV)
	touch $@

$(VENV)/ready: $(VENV)/demo-ready
	@echo "installing what the tests need into $(VENV), once"
	$(PIP) --no-build-isolation --editable '.[test]'
	@du -sh $(VENV)
	touch $@

$(VENV)/clients/ready: $(VENV)/ready Makefile
	rm -rf $(VENV)/clients
	-$(CLIENT)/megatron-core-0.19.2 megatron-core==0.19.2 triton==3.9.0
	-$(CLIENT)/transformers-5.18.0 transformers==5.18.0
	-$(CLIENT)/transformers-5.22.0 transformers==5.22.0
	mkdir -p $(VENV)/clients
	touch $@
endif
