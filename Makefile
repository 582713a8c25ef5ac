# Everything here works on a fresh machine that has Python 3.11 or newer: `make demo`, then `make test`.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export PYTHONDONTWRITEBYTECODE :=  # byte code is kept, or every process of the test suite would compile the package again
# glibc: memory that was given back is used again, instead of being mapped and cleared anew for every large tensor.
KEPT_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000
PYTEST := $(ONE_THREAD) $(KEPT_MEMORY) $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-peers check format bench docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

demo: .venv/.core  ## train a Vision Transformer on handwritten digits (2 to 3 minutes on 2 cores)
	rm -rf runs/demo
	$(BIN)/vitrail train digits --recipe digits --out runs/demo

test: .venv/.dev  ## run the test suite
	$(PYTEST)

test-peers: .venv/.peers  ## compare with timm, torchvision, transformers and pytorchvideo
	$(PYTEST) -m peers

check: .venv/.dev  ## lint, formatting, types, import directions and documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/.dev  ## sort imports and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.peers  ## measure models and the data path side by side with peers (leave the machine alone meanwhile)
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.video

docs: .venv/.dev  ## serve the documentation, rebuilt as you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:  ## remove caches and built files; .venv and runs stay
	rm -rf site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# One virtual environment, installed into only when it lacks something; each stamp says what it holds.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Vitrail needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev,video]"
	@touch .venv/.core $@

.venv/.peers: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev,video,peers]"
	@touch .venv/.core .venv/.dev $@
