# Entry points for users and developers. Requirements: python3 (3.11 to 3.13) with pip and venv, and a C++ compiler.

FAMILY ?= wan2.1
MODE ?= normal
WHAT ?= full

CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# pytest-xdist workers, 2 to 4: most tests run one busy process, or two that wait for each other.
WORKERS := $(shell n=$(CORES); [ $$n -ge 2 ] || n=2; [ $$n -le 4 ] || n=4; echo $$n)
OMP_NUM_THREADS ?= $(shell n=$$(( $(CORES) / 2 )); [ $$n -ge 1 ] || n=1; [ $$n -le 8 ] || n=8; echo $$n)

# What `make doctor` looks at: the user's own values of the variables that are set below.
USERS_VARIABLES := $(foreach name,HF_HOME HF_HUB_OFFLINE TORCH_EXTENSIONS_DIR,$(if $($(name)),$(name)='$($(name))'))

# No target downloads weights. HF_HOME is an empty folder, so that the user's accelerate configuration does not change a
# launch. PATH has the bin folder of .venv because DeepSpeed calls ninja by name.
export OMP_NUM_THREADS
export HF_HUB_OFFLINE := 1
export HF_HOME := $(CURDIR)/.venv/hf_home
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
export TOKENIZERS_PARALLELISM := false
export PYTHONNOUSERSITE := 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Modules are compiled once, not in each of the many processes of the tests: container images often set the last one.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup doctor demo test test-all check style map gpu torture

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 16

setup:  ## create or update .venv (the other targets do this first)
	@bash scripts/setup.sh

doctor:  ## what of this machine will not work, and how to fix it; works without setup
	@env -u HF_HOME -u HF_HUB_OFFLINE -u TORCH_EXTENSIONS_DIR $(USERS_VARIABLES) python3 -m videox.doctor

demo: setup  ## train a small model on real clips, stop, resume and sample (FAMILY=wan2.1|wan2.2|hunyuanvideo MODE=normal|i2v|inpaint|ti2v WHAT=full|lora)
	@python scripts/demo.py --family "$(FAMILY)" --mode "$(MODE)" --what "$(WHAT)"

test: setup  ## run all tests except the slow ones
	@python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow"

test-all: setup  ## run all tests
	@python -m pytest -q -n $(WORKERS) --dist loadfile --hypothesis-profile random --junitxml outputs/test-all.xml

check: setup  ## check lint, format, types and the repository's structure
	@ruff check .
	@ruff format --check .
	@mypy videox
	@python -m pytest -q tests/test_house.py

style: setup  ## fix lint and format automatically
	@ruff check --fix .
	@ruff format .

gpu: setup  ## measure this GPU in at most 8 minutes, or try it at small size without one: outputs/gpu.md (GPU_FLAGS="--parts smoke --again")
	@python benchmarks/gpu.py $(GPU_FLAGS)

torture: setup  ## try faults on runs, files and ranks for an hour per area, and go on where it stopped: benchmarks/torture.md (TORTURE_FLAGS="--areas disk --seconds 600")
	@python benchmarks/torture.py --seconds 3600 --continue --output benchmarks/torture.md $(TORTURE_FLAGS)

map: setup  ## write the import graph of the packages: docs/import_graph.md and its picture
	@python benchmarks/import_graph.py
