# Two commands are enough on a fresh machine with Python >= 3.11:
#   make demo   set up, then probe the built-in demo policy
#   make test   set up, then run linters, type checks, doctests and all tests
# And, for those who change what takes time:
#   make bench  set up, then measure speed and memory into benchmarks/RESULTS.md (ten minutes)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# bash -e would hide which step failed behind a pipe
SHELL := /bin/bash

# the pages of reports are tested in one of these; Debian's is installed where none is there
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable chrome

.PHONY: demo test bench setup setup-test browser lint docs clean

demo: setup
	$(BIN)/entropy-probe demo

test: setup-test browser lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --doctest-modules probe tests

# of verl and Liger one file each is read; in a folder of their own, where no library takes them for installed
bench: setup-test
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[bench]"
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/peers "verl>=0.9" "liger-kernel>=0.8"
	$(BIN)/python benchmarks/speed.py

setup: $(VENV)/.installed
setup-test: $(VENV)/.installed-test

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -c "from probe.results.reference import reference_page as page; print(page(), end='')" > docs/quantities.md
	$(BIN)/python -c "from probe.live.reference import reference_page as page; print(page(), end='')" > docs/training_names.md
	$(BIN)/python -c "from probe.attribution.reference import reference_page as page; print(page(), end='')" > docs/interventions.md

browser:
	@for name in $(BROWSERS); do command -v $$name > /dev/null && exit; done; \
	if [ -n "$$CHROMIUM" ] || ls -d /Applications/*Chrom*.app > /dev/null 2>&1; then exit; fi; \
	if command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ]; \
	then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null; \
	else echo "make test needs Chromium or Chrome for the tests of pages: install one, or set CHROMIUM to its path" >&2; exit 1; fi

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 needed, found " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
