# From a checkout to a result. `make table` needs Python 3.11 or newer and nothing else; the first target sets up .venv.
PYTHON ?= python3
MODEL  ?= tiny
SHAPE  ?= llama-7b
MINUTES ?= 18
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

# nothing of the caller's Python may stand in front of what .venv holds
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1

# torch for the tests: on Linux the build for the CPU, a tenth of the size of the one for cards, which PyPI has
TORCH  := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
ifeq ($(shell uname -s),Linux)
TORCH_ON_CPU := --extra-index-url https://download.pytorch.org/whl/cpu $(TORCH)+cpu
endif

.PHONY: help table test lab docs coverage bench scale pictures check-long fuzz lint format clean
.DELETE_ON_ERROR:

help:  ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 20

table: $(VENV)/.lab  ## print the size/ppl table of MODEL=tiny or smollm2, and write notebook, HTML, CSV and figures to data/runs/
	@if [ "$(MODEL)" = smollm2 ]; then $(BIN)/quantlab fetch smollm2; fi
	@$(BIN)/quantlab notebook size_ppl_table -p model "$(MODEL)" --overwrite

test: $(VENV)/.test  ## run the tests except slow ones, and the examples in docstrings
	$(BIN)/python -m pytest -m "not slow and not long"
	$(BIN)/python -m pytest --doctest-modules --doctest-ignore-import-errors quantlab

lab: $(VENV)/.lab  ## open JupyterLab on the index of the notebooks (this machine only); LAB=--no-browser adds options
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=notebooks --LabApp.default_url=/lab/tree/index.ipynb \
	    $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

bench: $(VENV)/.test  ## measure the speed of starting, kernels (compared with ggml's), quantizing, evaluating and refining
	$(BIN)/python tests/bench_start.py
	$(BIN)/python tests/bench_kernels.py --start
	$(BIN)/python tests/bench_quantize.py
	$(BIN)/python tests/bench_evaluator.py
	$(BIN)/python tests/bench_refine.py

scale: $(VENV)/.test  ## convert and quantize random weights of SHAPE=llama-7b or yi-34b [LAYERS=n]
	$(BIN)/python tests/scale.py $(SHAPE) $(if $(LAYERS),--layers $(LAYERS))

pictures: $(patsubst notebooks/%.ipynb,notebooks/pictures/%.png,$(filter-out %/index.ipynb,$(wildcard notebooks/*.ipynb)))  ## render one picture per notebook

notebooks/pictures/%.png: notebooks/%.ipynb $(VENV)/.lab
	$(BIN)/quantlab notebook $* --picture $@ --overwrite

notebooks/pictures/run_it.png: $(VENV)/.run
notebooks/pictures/train_the_bundled_model.png: $(VENV)/.gpu

check-long: $(VENV)/.test  ## run slow checks: 50 killed runs, SmolLM2's table, a published shape, fuzzing
	$(BIN)/python -m pytest -m "slow or long"
	$(MAKE) table MODEL=smollm2
	$(MAKE) scale
	$(MAKE) fuzz

fuzz: $(VENV)/.test  ## fuzz every reader for MINUTES=18 each (atheris: Linux only); results go to data/runs/fuzz/
	@$(PIP) install atheris
	for reader in gguf shards imatrix safetensors torch tokenizer checkpoint; do \
	    $(BIN)/python tests/fuzz_readers.py $$reader data/runs/fuzz/$$reader -max_total_time=$$((60 * $(MINUTES))) || exit 1; \
	done

lint: $(VENV)/.test  ## check lint and format with ruff, types with basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

docs: $(VENV)/.docs  ## build the documentation into data/runs/docs/, with every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict

coverage: $(VENV)/.test  ## run the tests of `make test` and report the lines they cover (without compiled kernels)
	@$(PIP) install -c constraints.txt coverage
	$(BIN)/python -m coverage run --source quantlab -m pytest -m "not slow and not long"
	$(BIN)/python -m coverage report --skip-covered --sort=cover

format: $(VENV)/.test  ## fix formatting and simple faults with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and results
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis data/runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ── the environment: a stamp per extra, so that a second run installs nothing ────────────────────────────────────────

$(VENV)/.python:
	@command -v $(PYTHON) > /dev/null || { echo "quantlab needs Python 3.11 or newer, $(PYTHON) is not there. Install it, or name another: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "quantlab needs Python 3.11 or newer, $(PYTHON) is older. Install one and name it, for instance: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "$(PYTHON) lacks the modules venv and ensurepip. Install them (Debian, Ubuntu: apt install python3-venv) or name another: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Setting up $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.lab: pyproject.toml constraints.txt | $(VENV)/.python
	@echo "Installing quantlab with what the notebooks need: about 140 packages, a few minutes, once"
	@$(PIP) install -c constraints.txt -e '.[lab]'
	@touch $@

# what two of the notebooks need to be run, and thus to be pictured, and what the documentation needs: extras of these names
$(VENV)/.run $(VENV)/.gpu $(VENV)/.docs: $(VENV)/.%: $(VENV)/.lab
	@$(PIP) install -c constraints.txt -e '.[lab,$*]'
	@touch $@

# ggml's own libraries are the judges of some tests; where they have no wheel, those tests are skipped
$(VENV)/.test: $(VENV)/.lab
	@echo "Installing what the tests need"
	@$(PIP) install -c constraints.txt -e '.[lab,test]'
	@for judge in libggml-python xllamacpp; do \
	    $(PIP) install -c constraints.txt --only-binary $$judge $$judge 2> /dev/null \
	        || echo "No wheel of $$judge for this platform: the tests against it will be skipped"; \
	done
	@$(PIP) install -c constraints.txt --only-binary :all: --retries 1 --timeout 15 $(or $(TORCH_ON_CPU),$(TORCH)) 2> /dev/null \
	    || $(PIP) install -c constraints.txt --only-binary :all: $(TORCH) 2> /dev/null \
	    || echo "torch cannot be installed: the tests of the engine for graphics cards will be skipped"
	@touch $@
