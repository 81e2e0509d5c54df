PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Some pinned releases need Python 3.11; on 3.10 torch alone is pinned.
PINS := $(shell $(PYTHON) -c 'import sys; print("constraints.txt" if sys.version_info >= (3, 11) else "$(VENV)/torch.txt")')
export HF_HUB_OFFLINE := 1
# Test processes, a thread each; each may hold a model of half a gigabyte.
WORKERS ?= 2

.PHONY: demo test test-full check bench docs setup clean

demo: setup
	$(BIN)/loract demo

test: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# Every preset on every architecture as well.
test-full: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile
	$(BIN)/python -m pytest -q -n $(WORKERS) -m full tests

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

bench: setup
	$(BIN)/loract bench
	$(BIN)/loract bench frontier

# Figures first: the theory's are computed, those of the results drawn from their records.
docs: $(VENV)/.docs
	$(BIN)/python benchmarks/theory.py --figures-only
	$(BIN)/python -m experiments.report
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install -q -c $(PINS) -e '.[docs]'
	touch $@

setup: $(STAMP)

# torch first and by its pin: a range would pull the newest build, with CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep '^torch==' constraints.txt > $(VENV)/torch.txt
	$(BIN)/python -m pip install -q -r $(VENV)/torch.txt
	$(BIN)/python -m pip install -q -c $(PINS) -e '.[all,demo,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache
