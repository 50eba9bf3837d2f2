# `make setup` builds .venv from nothing; `make demo` and `make test` do that first, and then their own work.
#
# PYTHON            the Python (3.11 or newer) that .venv is made from
# TORCH_INDEX_URL   a package index to take PyTorch from, for instance https://download.pytorch.org/whl/cu130. Unset, a
#                   Linux machine without an NVIDIA GPU takes the CPU build from PyTorch's own index, so as not to
#                   download gigabytes of CUDA packages; any other machine, or one that cannot reach that index, takes
#                   what pip's own configuration offers.
# ARGS              more arguments for pytest, in `make test` and `make test-peft`

PYTHON ?= python3
TORCH_INDEX_URL ?=
ARGS ?=

CPU_INDEX_URL := https://download.pytorch.org/whl/cpu
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# Taken before anything is installed: the demo's total_seconds starts here.
export TINYLORA_DEMO_START := $(shell date +%s)

.PHONY: setup demo test test-peft quality style clean

setup: $(STAMP)
	@echo "setup: $(VENV) is up to date"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "setup: Python 3.11 or newer is needed, and '$(PYTHON)' is not: make setup PYTHON=python3.11"; exit 1; }
	@test -x $(VENV)/bin/python || { echo "setup: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@index='$(TORCH_INDEX_URL)'; \
	if [ -z "$$index" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && $(VENV)/bin/python -c \
	    'import urllib.request; urllib.request.urlopen("$(CPU_INDEX_URL)/torch/", timeout=10)' 2>/dev/null; \
	    then index='$(CPU_INDEX_URL)'; fi; \
	echo "setup: installing PyTorch from $${index:-the index that pip is configured with}"; \
	$(PIP) install -qq $${index:+--no-deps --index-url "$$index"} -c constraints.txt torch
	@echo "setup: installing peft-tinylora with its extras and the versions of constraints.txt (some minutes)"
	@$(PIP) install -qq -c constraints.txt -e '.[recipes,quantization,dev]'
	@touch $@

demo: setup
	@echo "demo: GRPO on the embedded model, on a CPU"
	@$(VENV)/bin/accelerate launch --num_cpu_threads_per_process 2 \
	    --config_file trl_recipes/accelerate_configs/cpu.yaml \
	    trl_recipes/grpo.py --config trl_recipes/configs/embedded_grpo.yaml

test: setup
	@echo "test: the offline CPU tests"
	@$(VENV)/bin/python -m pytest $(ARGS)

# PEFT's own tests for its TinyLoRA, run on this one. Needs PyPI the first time.
test-peft: setup
	@$(VENV)/bin/python tests/contract/run_peft_tests.py $(ARGS)

quality: setup
	@echo "quality: ruff"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

style: setup
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist outputs .pytest_cache .ruff_cache *.egg-info
