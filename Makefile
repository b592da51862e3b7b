# `make demo` and `make test` do all their own set-up: Python 3.11 or newer, git and make are enough.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first Python that is new enough; `make PYTHON=/path/to/python3 …` chooses another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
WORKERS ?= 2
PYTEST_ARGS ?=
# One thread for each of the test processes: together they keep two cores busy, not more.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format test-gpu fuzz docs clean

help:  ## Show what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv and install Finesight into it, versions from constraints.txt

# torch goes first and by exactly this name, so that an index with a CPU build of it is heeded.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer was not found; install it or call make PYTHON=/path/to/python3" >&2; exit 1; fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,demo]"
	@touch $(STAMP)

demo: setup  ## Train a tiny model on real digits and measure it, before and after (CPU, no network)
	$(BIN)/finesight demo

check: setup  ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup check  ## check, then every test that runs on a CPU
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not gpu" $(PYTEST_ARGS)

test-gpu: setup  ## The tests that need an NVIDIA GPU
	$(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

fuzz: setup  ## 10,000 requests drawn from the server's OpenAPI schema (make test sends 300)
	$(TEST_ENV) FINESIGHT_FUZZ_REQUESTS=10000 $(BIN)/python -m pytest -n 0 -s tests/serve/test_fuzz.py

format: setup  ## Rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## Write docs/settings.md and docs/memory.md anew
	$(BIN)/python -m finesight.cli.reference > docs/settings.md
	$(BIN)/python -m bench.memory_report

clean:  ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) .ruff_cache .mypy_cache .pytest_cache build dist
