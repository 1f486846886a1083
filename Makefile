# The words people and CI use. A fresh clone needs python3, a C++17 compiler and PyPI; ARGS reaches the program: make demo ARGS="--data x.tsv".
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
SOURCES = $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test bench gpu check format build wheel clean

help:
	@echo "make demo    fine-tune a text classifier, selective AdamW beside plain AdamW"
	@echo "make test    run the tests"
	@echo "make bench   time the operators beside their peers"
	@echo "make gpu     everything that needs a GPU: tests, benchmarks, results in build/gpu; fails where there is none"
	@echo "make check   lint; make format puts the layout right"
	@echo "make wheel   a wheel in dist/"
	@echo "make clean   remove what was built (not $(VENV))"

demo: build
	$(RUN) -m uegr_kernels demo $(ARGS)

# In the tests' build a failure is an error; elsewhere the package goes on without native code.
test bench: export UEGR_KERNELS_BUILD ?= 1
test: build
	$(RUN) -m pytest $(ARGS)

bench: build
	$(RUN) -m bench $(ARGS)

check: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

format: $(VENV)/.ready
	$(RUN) -m ruff check --fix --select I .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

gpu: build
	$(RUN) -m bench.gpu $(ARGS)

# Ninja looks at the sources each time: a fraction of a second where nothing changed.
build: $(VENV)/.ready
	$(RUN) setup.py -q build_ext --inplace

wheel: $(VENV)/.ready
	rm -rf build/lib* dist
	$(RUN) -m pip wheel --no-deps --no-build-isolation -w dist .

# The environment, once for each change of what it is made from; the package is installed editable, `build` compiles it.
$(VENV)/.ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt
	UEGR_KERNELS_BUILD=0 $(RUN) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist *.egg-info uegr_kernels/_lib uegr_kernels/_bindings.*
