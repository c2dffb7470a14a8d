# Everything happens in .venv; nothing else on the machine is changed, except by `make tools`.
SHELL := /bin/bash
BIN := .venv/bin

.PHONY: help demo test test-slow sanitize lint format docs tools clean

help:
	@echo "make demo        set up and evaluate studies/smollm2-int8.yaml: the main job"
	@echo "make test        set up and run the default tests"
	@echo "make test-slow   the long tests as well"
	@echo "make sanitize    the kernels' tests under the address and undefined-behaviour sanitizers"
	@echo "make lint        ruff, mypy and import-linter"
	@echo "make docs        build the manual into site/"
	@echo "make tools       install yosys, OpenSTA, Icarus, Verilator and the OSU 180 nm cells with apt (optional)"
	@echo "make clean       remove .venv and build folders"

demo:
	@scripts/setup.sh
	$(BIN)/bitwright evaluate studies/smollm2-int8.yaml --output bitwright-out/smollm2-int8

test:
	@scripts/setup.sh test
	$(BIN)/python -m pytest

test-slow:
	@scripts/setup.sh test
	$(BIN)/python -m pytest -m 'slow or not slow'

sanitize:
	@scripts/setup.sh test
	@scripts/sanitize.sh

lint:
	@scripts/setup.sh test lint
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format:
	@scripts/setup.sh lint
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs:
	@scripts/setup.sh docs
	$(BIN)/python -m bitwright.reproduce.catalogue_pages docs
	$(BIN)/mkdocs build --strict

tools:
	@scripts/tools.sh

clean:
	rm -rf .venv build site dist bitwright-out
