# Everything runs from .venv, which is made on first use and made again when the pins or the packages change.
PYTHON ?= python3
ONLY ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
SCRIPTS := packaging/demo.py $(wildcard packaging/demo-model/training/*.py)
TRAINING := packaging/demo-model/training

.PHONY: help demo test check fault bench clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo           start a private daemon on the bundled model, kill it, resume a long session'
	@echo 'make test           run the tests (ARGS=... goes to pytest)'
	@echo 'make check          ruff, formatting and mypy --strict'
	@echo 'make fault          crash and corruption scenarios; writes build/fault.json'
	@echo 'make bench [ONLY=x] benchmarks; writes build/bench/NAME.json'
	@echo 'make clean          remove build outputs, caches and .venv'
	@echo 'PYTHON=python3.12 chooses the interpreter that .venv is made with (3.11 or later).'

demo: $(STAMP)
	$(BIN)/python packaging/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	MYPYPATH=$(TRAINING):clients/python $(BIN)/mypy --strict --explicit-package-bases $(SCRIPTS)

fault: $(STAMP)
	$(BIN)/python tests/fault/run.py $(ARGS)

bench: $(STAMP)
	$(BIN)/python tests/bench/run.py $(ONLY)

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache *.egg-info clients/python/*.egg-info clients/python/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml clients/python/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'AtlasInfer needs Python 3.11 or later. Name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'This Python cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e "clients/python[cli]" -e ".[dev]"
	@touch $@
