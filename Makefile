# The two commands a newcomer needs are `make demo` and `make test`; both set up first.

SHELL := /bin/bash
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup ffcv demo test test-long lint clean

PYTHON ?= python3
FFCV ?= yes
DEMO_ARGS ?= --out runs/demo
TEST_ARGS ?=
TEST_JOBS ?= 2
# Tests on real images are skipped where this is empty.
export LEOCLR_TEST_DATA ?= $(abspath $(wildcard ../shared/data))

bin := .venv/bin
stamp := .venv/setup.stamp
packages = $(wildcard dataset_tools pipelines leoclr_fast benchmarks)
# Bash prints the wall time of what follows; the exit status is that of the command.
timed = @TIMEFORMAT='[make] $(1): %0R s'; time
# The tests of dataset_tools have processes of their own: they fork often, which is slow where torch has been imported.
# 5 is pytest's exit status where TEST_ARGS selects nothing, 1 where a test failed; with any other it was stopped.
pytest = { for part in tests/dataset_tools 'tests --ignore=tests/dataset_tools'; do \
	OMP_WAIT_POLICY=PASSIVE $(bin)/python -m pytest $$part $(1) --durations=15 $(TEST_ARGS); end=$$?; ends+=$$end; \
	[[ $$end == [015] ]] || break; \
	done; [[ $$ends =~ ^(00|05|50)$$ ]]; }

help:
	@echo 'make demo       set up, draw a small data set, pretrain LeOCLR on it    DEMO_ARGS="$(DEMO_ARGS)"'
	@echo 'make test       set up, lint, run the tests                             TEST_ARGS="-k queue" TEST_JOBS=4'
	@echo 'make test-long  set up, run the long campaigns                          TEST_ARGS="-k queue"'
	@echo 'make lint       set up, then ruff, mypy and import-linter'
	@echo 'make setup      everything into .venv; takes no time when up to date    PYTHON=python3.12 FFCV=no CHROMIUM=no'
	@echo 'make ffcv       another try at FFCV, once its system packages are there'
	@echo 'make clean      remove .venv, caches and build outputs; runs/ stays'

setup: $(stamp)
	@echo "[setup] up to date: .venv with $$($(bin)/python -V); FFCV: $$(cat .venv/ffcv.status)"

$(stamp): pyproject.toml constraints.txt .ci/setup
	$(call timed,setup) PYTHON='$(PYTHON)' FFCV='$(FFCV)' .ci/setup
	@touch $@

ffcv: $(stamp)
	@.ci/setup ffcv

demo: setup
	$(call timed,demo) $(bin)/leoclr-fast demo $(DEMO_ARGS)

test: lint
	$(call timed,tests) $(call pytest,-m "not long" --numprocesses=$(TEST_JOBS) --dist=loadfile --no-loadscope-reorder)

test-long: setup
	$(call timed,long tests) $(call pytest,-m long)

lint: setup
	$(call timed,ruff) $(bin)/ruff check . && $(bin)/ruff format --check -q .
	$(call timed,mypy) $(bin)/mypy $(packages)
	$(call timed,import-linter) $(bin)/lint-imports --no-cache --no-logo

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
