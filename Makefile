# `make demo` and `make test` set everything up by themselves in $(VENV); they need python3 and nothing else.
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
OUTPUT ?= results/compare

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test tests coverage types audit docs lint format clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.natgrad-cli ## Train one network with every method on real data; writes $(OUTPUT)/report.html.
	$(BIN)/natgrad compare --output $(OUTPUT)

test: lint tests ## Run lint, type check and the whole test suite.

tests: $(VENV)/.natgrad-dev ## Run the whole test suite only.
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

coverage: $(VENV)/.natgrad-dev ## Run the test suite and say which lines of src/ it does not reach.
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

types: $(VENV)/.natgrad-dev ## Check that no type of the public interface is left to be inferred.
	$(PIP_INSTALL) 'pyright[nodejs]'
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pyright --verifytypes natgrad --ignoreexternal

audit: $(VENV)/.natgrad-dev ## Look for known vulnerabilities in what is installed (asks PyPI).
	$(PIP_INSTALL) pip-audit
	$(BIN)/pip-audit --skip-editable

docs: $(VENV)/.natgrad-docs ## Build the documentation site into site/; any warning is an error.
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs site

lint: $(VENV)/.natgrad-dev ## Run ruff and mypy only.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.natgrad-dev ## Format the code and fix what ruff can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and every cache.
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.natgrad-cli: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing natgrad into $(VENV) (a few minutes the first time) ..."
	$(PIP_INSTALL) -e '.[cli]'
	@touch $@

$(VENV)/.natgrad-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing natgrad's development environment into $(VENV) (a few minutes the first time) ..."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.natgrad-cli

$(VENV)/.natgrad-docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what builds the documentation into $(VENV) (a few minutes the first time) ..."
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@
