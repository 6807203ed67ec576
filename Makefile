# Every target does its own set-up (tools/environment.py): an active virtualenv or conda environment that has
# torch >= 2.10 is used in place, otherwise .venv is made with the versions in constraints.txt.
#   PYTHON=    the Python (3.10 or later) that makes .venv, whatever is active; python3 where it is not given
#   PIP_ARGS=  further arguments for pip, such as an index
#   ARGS=      further arguments for the command that the target runs

ifdef PYTHON
in_environment = "$(PYTHON)" tools/environment.py --own-venv
else
in_environment = python3 tools/environment.py
endif
export PIP_ARGS

.NOTPARALLEL:
.PHONY: help setup demo test test-all torch of-torch lint kernels docs bench ext clean

help:
	@echo "make demo      train I-JEPA on the embedded images into runs/demo; stopped and made again, it continues"
	@echo "make test      the tests that take minutes (test-all: every test that needs no GPU)"
	@echo "make torch     the tests that depend on torch, with another version of it (TORCH=) in an environment of its own"
	@echo "make lint      ruff: style and format"
	@echo "make kernels   compile the Triton kernels for sm_90, without a GPU, and judge the machine code"
	@echo "make docs      docs/ as a site in site/; links and code on the pages are tested"
	@echo "make bench     the tests, then every op beside its peers"
	@echo "make ext       the optional C++/CUDA extension, which draws masks faster (needs a C++ compiler)"
	@echo "make setup     the set-up alone, which every target does by itself"
	@echo "make clean     remove .venv and what tools left in the checkout (runs/ stays)"

setup:
	@$(in_environment) --extras train,test,dev

demo:
	@$(in_environment) --extras train -- -m ijepa_fast pretrain --config demo $(ARGS)

test:
	@$(in_environment) --extras train,test -- -m pytest -m "not slow and not gpu" $(ARGS)

test-all:
	@$(in_environment) --extras train,test -- -m pytest -m "not gpu" --durations=15 $(ARGS)

TORCH ?= 2.11.0
OF_TORCH = tests/test_attention.py tests/test_attention_padding.py tests/test_ops.py tests/test_step.py tests/test_captured.py

torch:
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(or $(PYTHON),python3) -m venv "$$folder" && \
	"$$folder/bin/python" -m pip install --quiet $(PIP_ARGS) "torch==$(TORCH)" hypothesis pytest && \
	VIRTUAL_ENV="$$folder" $(MAKE) of-torch PYTHON=

of-torch:  # in the environment that is active
	@$(in_environment) --extras train -- -m pytest -m "not slow and not gpu" $(OF_TORCH) $(ARGS)

lint:
	@$(in_environment) --extras dev -- -m ruff check .
	@$(in_environment) --extras dev -- -m ruff format --check .

kernels:
	@$(in_environment) --extras train,test -- tools/kernel_check.py $(ARGS)

docs:
	@NO_MKDOCS_2_WARNING=1 $(in_environment) --extras train,test,docs -- -m mkdocs build --strict
	@$(in_environment) --extras train,test,docs -- -m pytest tests/test_readme.py tests/test_docs_*.py $(ARGS)

bench: test
	@$(in_environment) --extras train,test -- -m pytest benchmarks --benchmark-only $(ARGS)

ext:
	@$(in_environment) --extras train,test -- tools/build_extension.py $(ARGS)

clean:
	rm -rf .venv build site ijepa_fast/_block_masks* dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find ijepa_fast kernels tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
