# Everything runs in $(VENV), made on first use: `make demo` from a fresh clone is enough.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check \
           --no-build-isolation -c constraints.txt

.PHONY: demo test check format bench clean

demo: $(VENV)/.examples
	$(BIN)/python examples/evoformer.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf $(VENV) .cache .hypothesis .*_cache build dist

# Stamps: what was installed, as of which pyproject.toml and constraints.txt.
$(VENV)/.venv: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) hatchling editables
	@touch $@

$(VENV)/.examples: $(VENV)/.venv pyproject.toml
	$(INSTALL) -e '.[examples]'
	@touch $@

$(VENV)/.test: $(VENV)/.venv pyproject.toml tests/plugin/pyproject.toml
	$(INSTALL) -e '.[test]'
	$(INSTALL) --no-deps -e tests/plugin
	@touch $@
