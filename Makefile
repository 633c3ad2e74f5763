PYTHON ?= python3
VENV ?= .venv
# Installed before all else, so that no other package picks the build. Any requirement or wheel.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: help demo test check format bench clean

help: ## Shows this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/ready ## Runs the main job in a few minutes; pictures and data go to demo_out/
	$(BIN)/tokenmix demo

test: $(VENV)/ready ## Runs the test suite
	$(BIN)/python -m pytest -n auto

check: $(VENV)/ready ## Formatting, lint, types, import floors, rendered numbers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py
	$(BIN)/tokenmix bench --check

format: $(VENV)/ready ## Formats the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/ready ## Measures, and renders the rows of data into the README
	$(BIN)/tokenmix bench

clean: ## Removes the environment and what the demo wrote
	rm -rf $(VENV) demo_out

$(VENV)/ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		--editable ".[triton,video,metrics,test,dev]"
	touch $@
