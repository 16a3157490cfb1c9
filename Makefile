SHELL := /bin/bash
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

# What was compiled is kept: the tests start many processes, and compiling transformers takes longer than importing it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-real test test-all test-oldest test-newest release-check build bench gpu gpu-wheels study lint docs clean

demo: .venv/ready
	$(BIN)/python -m examples.demo --seed $(SEED) --output demo-output

# The real draft -> refine, on a pretrained model that is had beforehand; without MODEL it says where.
demo-real: .venv/ready
	$(BIN)/python -m bench.study.real.demo --model $(or $(MODEL),./SmolLM2-135M-Instruct) --seed $(SEED)

test: .venv/ready
	@if command -v c++ > /dev/null; then $(MAKE) --no-print-directory build; else echo "no C++ compiler: testing on plain torch"; fi
	$(BIN)/python -m pytest

# And what only a release needs: every kernel compiled anew, whatever is recorded of it.
test-all: .venv/ready build
	$(BIN)/python -m pytest --release

# The suite with the lowest versions that pyproject.toml promises, and with the newest there are, in environments of their own.
test-oldest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --no-compile --constraint constraints-$*.txt --editable ".[dev]"
	.venv-$*/bin/python setup.py --quiet build_ext --inplace
	.venv-$*/bin/python -m pytest

# What is published: built from what is committed, and installed where the checkout is not.
release-check: .venv/ready
	$(BIN)/python -m pytest --release -n 0 tests/test_release.py

build: .venv/ready
	$(BIN)/python setup.py --quiet build_ext --inplace

# PEER_PYTHON: of an environment with transformers 4.56.2, which diverse_beam_step is compared with.
bench: build
	$(BIN)/python -m bench op --csv $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
	$(BIN)/python -m bench plots
	$(BIN)/python -m bench tables

# What a GPU has to show, in 9 minutes, on a machine whose Python (GPU_PYTHON) has torch for its CUDA and triton. What else
# sysdag needs lies in wheels/, if it is missing there: `make gpu-wheels` fetches it where there is a network.
GPU_PYTHON ?= python3
gpu:
	if [ -d wheels ]; then $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target wheels/site wheels/*.whl; fi
	PYTHONPATH=$(CURDIR)/wheels/site:$(CURDIR) $(GPU_PYTHON) setup.py --quiet build_ext --inplace
	PYTHONPATH=$(CURDIR)/wheels/site:$(CURDIR) $(GPU_PYTHON) -m bench gpu

GPU_WHEELS ?= accelerate beartype datasets diffusers dill liger-kernel multiprocess peft transformers trl
gpu-wheels: .venv/ready
	$(BIN)/python -m pip download --no-deps --only-binary=:all: --constraint constraints.txt --python-version 3.12 \
	  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any --dest wheels $(GPU_WHEELS)

# The paper's experiments on small systems: hours on 2 cores, goes on where it was stopped. QUICK=1: everything tiny.
# MODEL=FOLDER PAIRS="TRAIN TEST": those on a pretrained model.
study: .venv/ready
	$(BIN)/python -m bench study $(if $(QUICK),--quick) $(if $(MODEL),--real --model $(MODEL) --workers 2 $(if $(PAIRS),--pairs $(PAIRS)))

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
