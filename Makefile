# Everything from a fresh checkout on a machine with Python 3.11. See README.md.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# Flower must use this environment, and a local SuperLink of this checkout: another project's would
# run that project's code.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export FLWR_HOME := $(CURDIR)/.flwr
export FLWR_LOCAL_SUPERLINK_HTTP_API_PORT ?= 39271

.PHONY: help demo compare benchmarks test test-deployment check docs stop clean clean-kernels

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[train,privacy,dev,docs]'
	touch $@

demo: $(INSTALLED)  ## set up, then tune the built-in model on the built-in data
	@if pgrep -af '[f]lower-superlink.*$(FLWR_LOCAL_SUPERLINK_HTTP_API_PORT)' | grep -vqF '$(FLWR_HOME)/'; then \
		echo "another checkout's SuperLink has the port: 'make stop' there, or make demo" \
			"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=39272" >&2; exit 1; fi
	@mkdir -p results && touch results/.started
	flwr run . --stream
	@find results -path '*/final/config.json' -newer results/.started | grep -q . \
		|| { echo "the run has failed, see above" >&2; exit 1; }

compare: $(INSTALLED)  ## set up, then compare all methods on the built-in model
	$(BIN)/python -m benchmarks.compare benchmarks/plans/builtin.toml --output results/builtin

benchmarks: $(INSTALLED)  ## set up, then take all measurements that can be taken here
	$(BIN)/python -m benchmarks --all

test: $(INSTALLED)  ## set up, then run the tests
	$(BIN)/python -m pytest

test-deployment: $(INSTALLED)  ## set up, then run all tests with real SuperLink and SuperNodes
	$(BIN)/python -m pytest -m deployment

check: $(INSTALLED)  ## set up, then format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## set up, then build the documentation site in docs/_build, without network
	rm -rf docs/_build docs/reference/api
	$(BIN)/sphinx-build --nitpicky --fail-on-warning --keep-going --quiet docs docs/_build
	@echo "docs/_build/index.html"

stop:  ## end the SuperLink that this checkout leaves running
	-pkill -f '[f]lower-superlink.*$(FLWR_HOME)/'  # the brackets keep this line from matching

clean-kernels:  ## forget the compiled kernels
	find . -name '*.nb[ic]' -not -path './.venv/*' -delete

clean: stop  ## remove the environment, the SuperLink's files and the results
	rm -rf $(VENV) .flwr results docs/_build docs/reference/api
