# make setup    .venv with the tested set of packages (kept: a second time it needs no network)
# make demo     the whole job at toy size: runs/demo/report.html and runs/demo/family.json
# make test     linters, types, import rules, and the tests that need no GPU and no minutes
# make digits   the whole job on real input: scanned handwritten digits
# make gpu-check   GPU tests and all kernels' benchmarks, within nine minutes; JSON under OUT (default benchmarks/results)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= benchmarks/results
TEST_PROCESSES ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo digits test lint gpu-check clean help

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(STAMP)

# torch goes first and alone: with it in place, no other package pulls in another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/mmlg family demo --out runs/demo $(ARGS)

digits: $(STAMP)
	test -f runs/digits-data/dataset.json || $(BIN)/python examples/digits/make_images.py --out runs/digits-images
	$(BIN)/mmlg data pack runs/digits-images --out runs/digits-data --tokenizer words --templates "a scan of the handwritten digit {}." "the number {}." "a {}, written by hand."
	$(BIN)/mmlg family digits --data.path runs/digits-data --out runs/digits $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

# A GPU machine may hold torch alone: whatever python is there is used, and the packages from this folder.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:
	PYTHONPATH=kernels:. $(GPU_PYTHON) -m benchmarks.gpu_check --out $(OUT)

clean:
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
