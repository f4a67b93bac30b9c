# `make demo` and `make test` each set up everything on a fresh machine with Python >= 3.11, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help demo test check bench

help:
	@echo "make demo    fine-tune a real model, then a fleet of 64 adapters: seven minutes at most"
	@echo "make test    all checks and tests"
	@echo "make check   lint, types, import directions"
	@echo "make bench   speed and memory beside Hugging Face PEFT; rewrites results/ and the README's table"

# torch first and pinned: any other build pulls gigabytes of GPU libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/vera demo

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.bench
