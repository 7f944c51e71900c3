# Everything sets itself up: `make demo` and `make test` on a fresh machine with Python 3.11 and make.
#   make demo PIP_ARGS="--index-url https://..."   another package index or torch build
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
export PIP_ARGS
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Two processes with a thread each. A file's tests go to one of them, which makes what they share once; the files go in their order.
PARTED := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help bench demo test test-all check golden format setup dev clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      teach the embedded model who it is, and see it before and after"
	@echo "make test      check and fast tests, and one real run end to end"
	@echo "make test-all  the long tests too"
	@echo "make check     format, lint, types, import contract, golden files"
	@echo "make golden    write the golden files and generated docs anew"
	@echo "make format    format the code"
	@echo "make bench     against LLaMA-Factory and TRL, each in its own environment; takes hours. DATA=DIR with EmoLLM's files"

setup: $(VENV)/.ready
dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV): about 340 MB to download with a CPU build of torch, 1.6 GB on disk; where pip takes a CUDA build, about 3.1 GB to download"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready Makefile
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) pytest pytest-xdist hypothesis ruff mypy import-linter datasets sentencepiece playwright bitsandbytes
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps $(PIP_ARGS) trl  # for the chat templates that it ships
	@touch $@

demo: setup
	$(BIN)/tuneloom demo

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/test_golden.py

# The browser tests drive Debian's chromium at /usr/bin/chromium; they are skipped, and say so, where it is not.
test: check
	$(PARTED) -m "not real and not slow and not browser" --ignore=tests/test_golden.py
	$(PARTED) -m "browser and not real and not slow"
	$(PARTED) -m "real and not slow"

test-all: test
	$(BIN)/pytest -q -m slow

golden: dev
	$(BIN)/python -m tests.test_golden --write

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Without DATA the works made of EmoLLM's files are left out.
bench: setup
	$(BIN)/python benchmarks/peers.py --work $(if $(DATA),persona identity dialogue,identity) $(if $(DATA),--data $(DATA)) --json build/bench-lora.json
	$(BIN)/python benchmarks/peers.py --work identity --method dora --json build/bench-dora.json

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
