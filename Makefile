SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --color=no --numprocesses=$(WORKERS) --dist=worksteal
# Prints everything, and fails where no test passed: pytest itself is content if all of them were skipped.
SOME_PASSED := awk '{ print; fflush() } /^=+ .*[0-9]+ passed/ { passed = 1 } END { exit !passed }'

.PHONY: demo test

demo: .venv/demo.stamp
	mkdir -p out
	$(BIN)/dma-diffusers generate "a red apple left of a cat on a yellow background" --compare -o out/demo.png
	@echo "The picture is $(CURDIR)/out/demo.png"

# Triton's interpreter and its compiler cannot share a process. Each run is spread over WORKERS processes.
test: .venv/test.stamp
	$(PYTEST) | $(SOME_PASSED)
	TRITON_INTERPRET=1 $(PYTEST) -m kernel | $(SOME_PASSED)
	TRITON_INTERPRET=1 $(PYTEST) -m fuzz tests/kernels | $(SOME_PASSED)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
