# make demo    everything from nothing: packages, a guest, a backup under load, a test VM (as root, or with sudo)
# make test    everything that can be tested, from nothing
# make check   lint, types, layers, unit, contract and workflow tests: no root, no network
# make fuzz FUZZ_SECONDS=600   atheris on what a hostile clone can send; its own environment, its corpus in build/fuzz
# make package   a Debian package in build/package; make install DESTDIR=/x puts the same files there
# make bench NAME=backup   measurements, printed and written to build/bench/NAME.json
# make bench NAME=pause    how long guests stand still, and a picture of it; RAM=1024 RUNS=2 and more in integration/bench/pause.py;
#                          on Debian's backport of QEMU (integration/lab/emulator.py says why), QEMU= on the host's own
# make bench NAME=store    the replica against restic and BorgBackup; SIZE=8192 (MiB) is the size of the image
SHELL := /bin/bash
PYTHON := .venv/bin/python
LAB := $(PYTHON) -m integration.lab run --
# How many labs the integration tests are spread over. Guests are emulated on one core each where there is no KVM.
LABS ?= 2
NAME ?= backup
QEMU ?= $(CURDIR)/build/qemu
FUZZ_SECONDS ?= 600
FUZZ := build/fuzz

.PHONY: demo test check lint unit integration fuzz bench package install setup venv clean

demo: setup
	$(LAB) $(PYTHON) -m integration.demo

test: setup
	bash integration/setup.sh tests
	$(MAKE) --no-print-directory check
	$(MAKE) --no-print-directory integration

check: venv
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint unit

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

unit: venv
	.venv/bin/python -m pytest tests -q --numprocesses=auto --cov --cov-report=term:skip-covered --cov-fail-under=85

integration: setup
	bash integration/setup.sh tests
	packaging/package.sh
	$(PYTHON) -m pytest integration -q --tb=short --durations=15 --dist=loadfile --tx='$(LABS)*popen//python=$(LAB) $(PYTHON)'

bench: setup
	@[ $(NAME) != pause ] || bash integration/setup.sh plots
	@[ $(NAME) != store ] || bash integration/setup.sh peers
	@[ $(NAME) != pause ] || [ -z "$(QEMU)" ] || bash integration/setup.sh qemu
	$(if $(filter pause,$(NAME)),VMSNAP_LAB_QEMU="$(QEMU)") $(LAB) $(PYTHON) -m integration.bench $(NAME)
	@[ $(NAME) != pause ] || $(PYTHON) -m integration.bench.plot build/bench/pause.json build/bench/pause.png

fuzz: $(FUZZ)/venv/installed
	nice -n 15 $(FUZZ)/venv/bin/python -m integration.fuzz $(FUZZ) -max_total_time=$(FUZZ_SECONDS)

$(FUZZ)/venv/installed: integration/fuzz/requirements.txt
	/usr/bin/python3 -m venv $(FUZZ)/venv
	$(FUZZ)/venv/bin/python -m pip install -q --disable-pip-version-check -r $<
	touch $@

package:
	packaging/package.sh

install:
	packaging/install.sh "$(DESTDIR)"

setup:
	bash integration/setup.sh system
	bash integration/setup.sh venv

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	bash integration/setup.sh venv

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
