# make demo    everything from nothing: packages, a guest, a backup under load, a test VM (as root, or with sudo)
# make test    everything that can be tested, from nothing
# make check   lint, types, layers, unit, contract and workflow tests: no root, no network
# make bench NAME=backup   measurements, printed and written to build/bench/NAME.json
SHELL := /bin/bash
PYTHON := .venv/bin/python
LAB := $(PYTHON) -m integration.lab run --
NAME ?= backup

.PHONY: demo test check lint unit integration bench setup venv clean

demo: setup
	$(LAB) $(PYTHON) -m integration.demo

test: setup
	bash integration/setup.sh tests
	$(MAKE) --no-print-directory check
	$(MAKE) --no-print-directory integration

check: venv lint unit

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

unit: venv
	.venv/bin/coverage run -m pytest tests -q
	.venv/bin/coverage report --skip-covered --fail-under=85

integration: setup
	bash integration/setup.sh tests
	$(LAB) $(PYTHON) -m pytest integration -q --durations=15

bench: setup
	$(LAB) $(PYTHON) -m integration.bench $(NAME)

setup:
	bash integration/setup.sh system
	bash integration/setup.sh venv

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	bash integration/setup.sh venv

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
