# Everything here works from a fresh clone with nothing but Python (3.10 or later; 3.11 is what CI runs) and make.
# What is installed goes into .venv; stamps in it make a second call instant.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# An index to take torch from, before PyPI's, e.g. https://download.pytorch.org/whl/cpu (no CUDA: much smaller).
TORCH_INDEX ?=

# make demo: the length of a new run, and by how much to lengthen a complete one (e.g. 500K).
TOKENS ?=
MORE ?=

# make test: what to run, e.g. TESTS=tests/data_pipeline
TESTS ?= tests

.PHONY: help install demo test test-gpu test-py312 clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo              install, build corpora from this machine, train a small JetMoE on two processes, report"
	@echo "make demo MORE=500K    go on with the complete run of the demo for so many more tokens"
	@echo "make test              install what the tests need and run them (TESTS=tests/parallel for some of them)"
	@echo "make test-gpu          what needs a GPU, with the Python that has torch for it (PYTHON=python in NVIDIA's container)"
	@echo "make test-py312        the same on Python 3.12 with torch $(TORCH312), a build with CUDA"
	@echo "make install           only install, into .venv (then: . .venv/bin/activate; moe-train --help)"
	@echo "make clean             remove what the demo built (build/demo) and its run (runs/demo), and caches"
	@echo "make distclean         the same and .venv"
	@echo "TORCH_INDEX=URL        with any of them: the package index to prefer for torch, as the one without CUDA"

install: .venv/.installed

demo: .venv/.installed
	$(BIN)/python -m moe_train.demo $(if $(TOKENS),--tokens $(TOKENS)) $(if $(MORE),--more $(MORE))

# One thread a process: the tests start several processes on the cores there are. Two workers (tests/conftest.py says
# which takes what): one test in two waits, or computes on one core alone.
PYTEST := -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test: .venv/.installed-tests
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(TESTS)

# With the interpreter as it is: a GPU's torch and Transformer Engine are not of this Makefile's making. -s shows what was measured.
test-gpu:
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no GPU here')"
	$(PYTHON) -m pytest -s tests/gpu

# torch comes first and on its own: the version that constraints.txt pins has a build for CPUs, while a newer one, which
# an unconstrained requirement of another package could pick, drags in gigabytes of CUDA.
.venv/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 and no python3 found: install Python 3.11"; exit 2; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "$(PYTHON) is older than 3.10"; exit 2; }
	@echo "creating .venv with $(PYTHON) and installing torch (some minutes the first time)"
	$(PYTHON) -m venv .venv
	$(PIP) install torch -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

# `export` brings transformers and safetensors: after this every verb works.
.venv/.installed: .venv/.torch setup.py constraints.txt
	@echo "installing moe-train and what it needs"
	$(PIP) install -e ".[export]" -c constraints.txt
	@touch $@

.venv/.installed-tests: .venv/.installed
	@echo "installing what the tests need"
	$(PIP) install -e ".[export,test]" -c constraints.txt
	@touch $@

# The suite on Python 3.12 with the torch of NVIDIA's containers: a build with CUDA, gigabytes of it, whether or not there is a GPU.
PYTHON312 ?= $(shell command -v python3.12)
TORCH312 ?= 2.11.0

test-py312: .venv-py312/.installed-tests
	OMP_NUM_THREADS=1 .venv-py312/bin/python $(PYTEST) $(TESTS)

.venv-py312/.installed-tests: setup.py constraints.txt
	@test -n "$(PYTHON312)" || { echo "no python3.12 found: install it, or name it with PYTHON312=/path/to/python3.12"; exit 2; }
	$(PYTHON312) -m venv .venv-py312
	grep -v '^torch==' constraints.txt > .venv-py312/constraints.txt
	.venv-py312/bin/python -m pip --disable-pip-version-check --quiet install torch==$(TORCH312)
	.venv-py312/bin/python -m pip --disable-pip-version-check --quiet install -e ".[export,test]" -c .venv-py312/constraints.txt
	@touch $@

clean:
	rm -rf build/demo runs/demo .pytest_cache .hypothesis

distclean: clean
	rm -rf .venv .venv-py312
