# Serves whoever clones the repository: `make demo` and `make test` need only python3 (3.11 to 3.13), pip and a C++ compiler.

FAMILY ?= wan2.1
MODE ?= normal

CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Test files run side by side; most of their time is one process that computes, or two that wait for each other.
WORKERS := $(shell n=$(CORES); [ $$n -ge 2 ] || n=2; [ $$n -le 4 ] || n=4; echo $$n)
OMP_NUM_THREADS ?= $(shell n=$$(( $(CORES) / 2 )); [ $$n -ge 1 ] || n=1; [ $$n -le 8 ] || n=8; echo $$n)

# Nothing here downloads weights; HF_HOME is an empty folder, so that no accelerate configuration of this machine changes
# a launch; ninja, which DeepSpeed calls by name, is in the environment's bin folder.
export OMP_NUM_THREADS
export HF_HUB_OFFLINE := 1
export HF_HOME := $(CURDIR)/.venv/hf_home
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
export TOKENIZERS_PARALLELISM := false
export PYTHONNOUSERSITE := 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check style

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 16

setup:  ## create or update .venv (the other targets do it themselves)
	@bash scripts/setup.sh

demo: setup  ## train a small model on real clips, stop and resume it, sample from it (FAMILY=wan2.1 MODE=normal)
	@python scripts/demo.py --family "$(FAMILY)" --mode "$(MODE)"

test: setup  ## run the tests, except the slow ones
	@python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow"

test-all: setup  ## run every test
	@python -m pytest -q -n $(WORKERS) --dist loadfile --junitxml outputs/test-all.xml

check: setup  ## lint, format, types, house rules
	@ruff check .
	@ruff format --check .
	@mypy videox
	@python -m pytest -q tests/test_house.py

style: setup  ## mend what lint and format can mend
	@ruff check --fix .
	@ruff format .
