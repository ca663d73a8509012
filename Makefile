# Every target sets up its own virtual environment on first use: Python >= 3.11 and make are all a fresh machine needs.
#
#   make demo     the whole path on a scratch directory, with one table at the end
#   make serve    run the daemon (DIR=kvdb-data PORT=6374 ARGS="--maxstore 4gb ...")
#   make cli      talk to it (ARGS="PING")
#   make test     the tests (make test-slow: the long ones; make show: the long programs of tests/show)
#   make check    format, lint, types, tests, docs, in that order: what CI runs
#   make clean    remove the environment and caches (never a data directory)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
comma := ,
DIR ?= kvdb-data
PORT ?= 6374
ARGS ?=

# The first interpreter that is new enough: macOS ships an old `python3`, so newer names are tried too.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: demo serve cli test test-slow show check format lint types docs clean ready help

help:
	@sed -n '3,9s/^# *//p' Makefile

# $(call install,EXTRAS): make the environment if there is none, and say how long it took.
define install
	@test -n "$(PYTHON)" || { echo "kvdb needs Python 3.11 or newer; none was found (set PYTHON=...)"; exit 1; }
	@started=$$(date +%s); \
	echo "setting up $(VENV) with $$($(PYTHON) --version), kvdb[$(1)] ..."; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || exit 1; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(1)]' || exit 1; \
	touch $@; \
	echo "set up in $$(( $$(date +%s) - started )) s"
endef

# To run: `engine` runs models (MLX on a GPU, numpy on processors), `http` is for --http-port.
$(READY): pyproject.toml
	$(call install,engine$(comma)http)

# To test: also what the tests need.
$(READY_DEV): pyproject.toml
	$(call install,engine$(comma)http$(comma)dev)
	@touch $(READY)

ready: $(READY)

demo: $(READY)
	$(BIN)/kvdb-demo $(ARGS)

serve: $(READY)
	@mkdir -p $(DIR)
	$(BIN)/kvdb-server --dir $(DIR) --port $(PORT) $(ARGS)

cli: $(READY)
	@$(BIN)/kvdb-cli -p $(PORT) $(ARGS)

test: $(READY_DEV)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(READY_DEV)
	$(BIN)/python -m pytest -m slow $(ARGS)

show: $(READY_DEV)
	@for program in $(filter-out tests/show/test_%.py tests/show/records.py,$(wildcard tests/show/*.py)); do \
	echo "== $$program"; $(BIN)/python $$program $(ARGS) || exit 1; done

check: format lint types test docs

format: $(READY_DEV)
	$(BIN)/ruff format --check .

lint: $(READY_DEV)
	$(BIN)/ruff check .

types: $(READY_DEV)
	$(BIN)/mypy

docs: $(READY_DEV)
	$(BIN)/python -m kvdb.commands.reference --check docs/commands.md docs/kvdb.conf
	$(BIN)/python -m kvdb_tools.doccheck .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
