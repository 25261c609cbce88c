# make setup    .venv with the tested set of packages (kept: a second time it needs no network)
# make demo     the whole job at toy size: runs/demo/report.html and runs/demo/family.json
# make test     linters, types, import rules, and the tests that need no GPU and no minutes
# make digits   the whole job on real input: scanned handwritten digits
# make icons    the whole job on real input: 114,000 icons with their designers' names, downloaded with npm (104 MB)
# make gpu-check   on a GPU: PART=1 tests and tiles, PART=2 benchmarks; nine minutes each; files under OUT (default benchmarks/results)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= benchmarks/results
TEST_PROCESSES ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo digits icons test lint gpu-check clean help

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

# The package is kept: what was downloaded whole, rendered whole or packed whole is not made again.
ICONIFY := iconify-json-2.2.535.tgz
ICONIFY_SHA512 := 9c057ad00094487c27b1be9fb29fa57ad1e5364af03b8bf306d702e81e040c712b4107dece4ec4de725d9f0263bdee8e09f30d3b4b954f956b8276bdfcd0a65f

runs/icons-package/$(ICONIFY):
	mkdir -p runs/icons-package/part
	npm pack --silent --pack-destination runs/icons-package/part @iconify/json@$(ICONIFY:iconify-json-%.tgz=%)
	echo "$(ICONIFY_SHA512)  runs/icons-package/part/$(ICONIFY)" | sha512sum --check --quiet
	mv runs/icons-package/part/$(ICONIFY) $@

runs/icons-images/pairs.csv: | $(STAMP) runs/icons-package/$(ICONIFY)
	$(BIN)/python examples/icons/make_images.py --package runs/icons-package/$(ICONIFY) --out runs/icons-images --sources examples/icons/SOURCES.md

runs/icons-data/dataset.json: | runs/icons-images/pairs.csv
	$(BIN)/mmlg data pack runs/icons-images/pairs.csv --out runs/icons-data --tokenizer words

icons: $(STAMP) runs/icons-data/dataset.json
	$(BIN)/mmlg family icons --data.path runs/icons-data --out runs/icons $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

# A GPU machine may hold torch alone: whatever python is there is used, and the packages from this folder. At most nine minutes a part.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
PART ?= 1
gpu-check:
	PYTHONPATH=kernels:launchers:.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m benchmarks.gpu_check --part $(PART) --out $(OUT)

clean:
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
