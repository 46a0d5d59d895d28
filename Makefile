# Targets that need an environment set it up first with tools/set_up.py, which returns at once if nothing changed.
# SET=all has all engines, with Spark 3.5 on Python 3.11; SET=current has the versions of today, with Spark 4 on Python 3.12
# or 3.13.

.DEFAULT_GOAL := help
.PHONY: help set-up set-up-jax demo test test-all test-fast soak check bench dist lock clean distclean
.NOTPARALLEL:
SHELL := /bin/sh
# Without bytecode in the environment, every process compiles TensorFlow's Python again: ten seconds of a core.
unexport PYTHONDONTWRITEBYTECODE

# The first working Python of these versions. A version manager's python3.12 may exist without working, and work elsewhere.
WANTED := $(if $(filter current,$(SET)),3.12 3.13,3.11 $(if $(SET),,3.12 3.13))
version_of = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
places_of = python$(1) $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(1).*/bin/python) python3 python
found = $(firstword $(foreach python,$(places_of),$(if $(filter $(1),$(call version_of,$(python))),$(python))))
ifndef PYTHON
PYTHON := $(or $(call found,$(word 1,$(WANTED))),$(call found,$(word 2,$(WANTED))),$(call found,$(word 3,$(WANTED))))
endif
ifndef SET
SET := $(if $(filter 3.12 3.13,$(call version_of,$(PYTHON))),current,all)
endif
BIN := $(if $(filter current,$(SET)),.venv-current,.venv)/bin
DIST := dist
PYTEST := $(BIN)/python -m pytest
# Each worker runs whole files, in the order set by conftest.py, in its own Spark session.
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

set-up:  ## create or update .venv, or .venv-current with SET=current
	@if [ -z "$(PYTHON)" ]; then \
	  echo "Expected Python $(WANTED); got none. Install one, or run make PYTHON=/path/to/python." >&2; exit 1; fi
	@"$(PYTHON)" tools/set_up.py --set $(SET)

demo: set-up  ## train on two local Spark workers and show the results (make demo ENGINES=all compares the engines)
	@$(BIN)/python demo/run.py $(ENGINES)

set-up-jax: set-up
	@"$(PYTHON)" tools/set_up.py --set $(SET) --jax

# What depends on the versions of Spark, Python, TensorFlow and NumPy. Everything is tested with SET=all.
CURRENT := backends/mirrored tests/test_contract_local.py tests/spark tests/data tests/driver tests/mends tests/worker \
  tests/images/test_prepare.py tests/ml/test_stages.py tests/ml/test_saving.py tests/cli tests/study/test_study.py

ifeq ($(SET),current)
test: set-up  ## run check, then the tests except those marked full, two at a time
	$(PYTEST) $(TWO_WORKERS) -m "not alone and not full" $(wildcard $(CURRENT))
else
test: set-up-jax check
	$(PYTEST) $(TWO_WORKERS) -m "not alone and not full"
	$(PYTEST) -m "alone and not full"
endif

test-all: set-up-jax check  ## run all tests: every fault on every engine
	$(PYTEST) $(TWO_WORKERS) -m "not alone"
	$(PYTEST) -m alone

soak: set-up  ## send random signals to workers of RUNS=20 runs; appends to tests/faults/soak.jsonl
	$(BIN)/python tools/soak.py --runs $(or $(RUNS),20) $(if $(SEED),--seed $(SEED))

test-fast: set-up  ## run the tests that need no Spark, in under two minutes
	$(PYTEST) -m "not spark and not slow and not cluster and not full"

check: set-up  ## check lint, format, types and architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dlspark benchmarks/dlspark_bench $(dir $(wildcard backends/*/dlspark_*/__init__.py))
	$(PYTEST) -q tests/test_architecture.py

bench: set-up  ## measure the engines on this machine; updates benchmarks/results and the README's table
	$(BIN)/python benchmarks/short.py

# Offline and with the .venv's setuptools. Each wheel is built from its sdist, which proves the sdist complete.
dist: set-up  ## build a wheel and an sdist of every distribution into dist/ and check them
	rm -rf $(DIST)
	set -e; for folder in . $(patsubst %/setup.cfg,%,$(wildcard backends/*/setup.cfg)) benchmarks; do \
	  $(BIN)/uv --no-config build --quiet --offline --no-build-isolation --python $(BIN)/python --out-dir $(DIST) $$folder; done
	$(BIN)/twine check --strict $(DIST)/*

lock: set-up  ## write the three locks (make lock UPGRADE=1 for the newest versions)
	$(BIN)/uv --no-config pip compile $(if $(UPGRADE),--upgrade) --quiet --generate-hashes --no-annotate \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command "make lock" --output-file requirements.lock requirements.in
	$(BIN)/uv --no-config pip compile $(if $(UPGRADE),--upgrade) --quiet --generate-hashes --no-annotate \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command "make lock" --output-file requirements-jax.lock requirements-jax.in
	$(BIN)/uv --no-config pip compile $(if $(UPGRADE),--upgrade) --quiet --generate-hashes --no-annotate \
	  --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command "make lock" --output-file requirements-current.lock requirements-current.in

clean:  ## remove caches, builds and the demo's output
	rm -rf build dist demo-output spark-warehouse metastore_db derby.log .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -path ./.git -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -print0 | xargs -0 rm -rf
	find backends benchmarks -name build -type d -print0 2>/dev/null | xargs -0 rm -rf

distclean: clean  ## run clean and remove the environments; keeps the built Horovod in ~/.cache/dlspark
	rm -rf .venv .venv-jax .venv-current
