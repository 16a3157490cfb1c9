SHELL := /bin/bash
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

# What was compiled is kept: the tests start many processes, and compiling transformers takes longer than importing it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all build bench study lint docs clean

demo: .venv/ready
	$(BIN)/python -m examples.demo --seed $(SEED) --output demo-output

test: .venv/ready
	@if command -v c++ > /dev/null; then $(MAKE) --no-print-directory build; else echo "no C++ compiler: testing on plain torch"; fi
	$(BIN)/python -m pytest

# And what only a release needs: every kernel compiled anew, whatever is recorded of it.
test-all: .venv/ready build
	$(BIN)/python -m pytest --release

build: .venv/ready
	$(BIN)/python setup.py --quiet build_ext --inplace

# PEER_PYTHON: of an environment with transformers 4.56.2, which diverse_beam_step is compared with.
bench: build
	$(BIN)/python -m bench op --csv $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
	$(BIN)/python -m bench plots
	$(BIN)/python -m bench tables

# The paper's experiments on small systems: hours on 2 cores, goes on where it was stopped. QUICK=1: everything tiny.
study: .venv/ready
	$(BIN)/python -m bench study $(if $(QUICK),--quick)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in site/; `.venv/bin/mkdocs serve` shows it while it is written.
docs: .venv/ready
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv demo-output .demo-cache build site *.egg-info

# Modules are compiled when they are first imported, which most never are: that halves the installation's time.
.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@
