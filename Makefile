SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --color=no --numprocesses=$(WORKERS) --dist=worksteal
# Prints everything, and fails where no test passed: pytest itself is content if all of them were skipped.
SOME_PASSED := awk '{ print; fflush() } /^=+ .*[0-9]+ passed/ { passed = 1 } END { exit !passed }'

# Of each minor version the newest; the interpreters of the later ones have block-scaled products.
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0
INTERPRETING_TRITONS := 3.8.0 3.9.0
# The oldest that pyproject.toml admits; the environment has the newest.
OLDEST_DIFFUSERS := 0.42.0

.PHONY: demo docs test test-tritons test-diffusers
.SECONDARY:

demo: .venv/demo.stamp
	mkdir -p out
	$(BIN)/dma-diffusers generate "a red apple left of a cat on a yellow background" --compare -o out/demo.png
	@echo "The picture is $(CURDIR)/out/demo.png"

# The site, as CI builds it (tests/docs/test_site.py); no network is needed once mkdocs is installed.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir out/site
	@echo "The site is $(CURDIR)/out/site/index.html"

# Triton's interpreter and its compiler cannot share a process. Each run is spread over WORKERS processes.
test: .venv/test.stamp
	$(PYTEST) | $(SOME_PASSED)
	TRITON_INTERPRET=1 $(PYTEST) -m kernel | $(SOME_PASSED)
	TRITON_INTERPRET=1 $(PYTEST) -m fuzz tests/kernels | $(SOME_PASSED)

# Before a release: each Triton lies beside the environment's own, and is the first that its processes find.
test-tritons: $(TRITONS:%=test-compiled-by-%) $(INTERPRETING_TRITONS:%=test-interpreted-by-%)

test-compiled-by-%: .venv/test.stamp .venv/triton-%
	PYTHONPATH=$(CURDIR)/.venv/triton-$* $(PYTEST) tests/kernels/test_compile.py tests/kernels/test_sass.py \
		tests/kernels/linears/test_compile.py tests/kernels/training/test_compile.py | $(SOME_PASSED)

test-interpreted-by-%: .venv/test.stamp .venv/triton-%
	PYTHONPATH=$(CURDIR)/.venv/triton-$* TRITON_INTERPRET=1 $(PYTEST) -m kernel | $(SOME_PASSED)

test-diffusers: .venv/test.stamp .venv/diffusers-$(OLDEST_DIFFUSERS)
	PYTHONPATH=$(CURDIR)/.venv/diffusers-$(OLDEST_DIFFUSERS) $(PYTEST) tests/dma_diffusers tests/pipelines | $(SOME_PASSED)

.venv/triton-%: | .venv/bin/python
	$(BIN)/python -m pip install --quiet --target $@ --no-deps triton==$*

.venv/diffusers-%: | .venv/bin/python
	$(BIN)/python -m pip install --quiet --target $@ --no-deps diffusers==$*

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
