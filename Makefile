# `make demo` and `make test` set everything up in .venv. With another interpreter, as in
# `make test PYTHON=python3.13`, the environment is one of that version's own, .venv-3.13.
PYTHON ?= python3
# A shim of pyenv does not answer for a version that is installed but not switched on.
ifneq ($(shell $(PYTHON) -c 'print(1)' 2>/dev/null),1)
INSTALLED := $(wildcard $(shell pyenv root 2>/dev/null)/versions/*/bin/$(notdir $(PYTHON)))
override PYTHON := $(or $(lastword $(sort $(INSTALLED))),$(PYTHON))
endif
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv$(if $(filter file,$(origin PYTHON)),,-$(VERSION))
CONSTRAINTS := constraints$(if $(filter 3.11,$(VERSION)),,-newest).txt
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(VERSION)
COMPILERS := $(VENV)/compilers
# Tests start many processes, and without kept bytecode each compiles this library's source again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup compilers docs demo test test-all stress fuzz networks lint bench decorrelation clean

help:
	@echo "make demo      trains, converts, verifies and continues a network on digits; two minutes"
	@echo "make test      the tests that take seconds each"
	@echo "make test-all  every test but those of make stress"
	@echo "make stress    kills 40 training runs and 200 conversions at random moments, three quarters of an hour"
	@echo "make fuzz      opens mutated files for five minutes; longer with SECONDS=3600"
	@echo "make networks  reads 2,000 networks as people write them; 15 minutes"
	@echo "make lint      ruff and pyright"
	@echo "make docs      the site in docs/_build/html, warnings as errors; it runs the notebooks, and keeps what they showed"
	@echo "make compilers the compilers for TPU and CUDA (400 MB), for flax-resblock aot; no device needed"
	@echo "make bench     conversion against a plain copy"
	@echo "make decorrelation   how long float32 runs stay together, docs/decorrelation.png"
	@echo "Each of them takes another interpreter, as in make test PYTHON=python3.13"

# An environment whose interpreter has another version is made anew.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flax-resblock needs Python 3.11 or newer; say which with make PYTHON=python3.13")'
	test ! -e $(VENV)/pyvenv.cfg || test -d $(VENV)/lib/python$(VERSION) || rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[torch,train,report,docs,hub,h5,dev]'
	$(INSTALL) --no-deps torchvision
	$(INSTALL) -e '.[families]'
	touch $(STAMP)

setup: $(STAMP)

# In a folder of their own, so that jax does not look for devices with them.
$(COMPILERS)/installed: $(STAMP)
	$(INSTALL) --no-deps --upgrade --target $(COMPILERS) libtpu jax-cuda12-plugin jax-cuda12-pjrt
	mkdir -p $(COMPILERS) && touch $@

compilers: $(COMPILERS)/installed

NOTEBOOKS ?= cache
docs: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" FLAX_RESBLOCK_NOTEBOOKS=$(NOTEBOOKS) $(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html

demo: $(STAMP)
	$(BIN)/flax-resblock demo

# A file's tests run in one process, which makes its fixtures and compiles its programs once.
BY_FILE := -n auto --dist loadfile --no-loadscope-reorder

# Compiling is most of the time of these tests, and they pass at each level of LLVM's: the gate runs
# them at the level of parity_tests/conftest.py and at the users' too.
test: $(STAMP)
	XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(BIN)/python -m pytest $(BY_FILE) -m "not slow and not stress"

test-all: $(STAMP) compilers
	$(BIN)/python -m pytest $(BY_FILE) -m "not stress"

stress: $(STAMP)
	$(BIN)/python -m pytest -m stress
	$(BIN)/python -m parity_tests.preemption --runs 40
	$(BIN)/python -m parity_tests.kills --kills 200

SECONDS ?= 300
fuzz: $(STAMP)
	$(BIN)/python -m parity_tests.fuzz $(SECONDS)

networks: $(STAMP)
	$(BIN)/python -m parity_tests.people --networks 2000

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/python benchmarks/convert.py

decorrelation: $(STAMP)
	$(BIN)/python benchmarks/decorrelation.py docs/decorrelation.png

clean:
	rm -rf .venv .venv-* demo_out .pytest_cache .ruff_cache .hypothesis *.egg-info docs/_build docs/reference/commands
