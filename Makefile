PYTHON ?= python3
VENV ?= .venv
# Installed before all else, so that no other package picks the build. Any requirement or wheel.
TORCH ?= $(LOCKED_TORCH)
LOCKED_TORCH := torch==2.13.0
BIN := $(VENV)/bin
# What the GPU machine runs.
PYTHON312 ?= python3.12
GPU_TESTS := tests/backends tests/bench $(patsubst %,tests/test_%.py,functional imports ops torch_internals)
# The lowest release that pyproject.toml allows, as for TORCH, and what tests the native library there.
OLDEST_TORCH ?= torch==2.10.0
NATIVE_TESTS := tests/backends/test_cpu.py $(patsubst %,tests/test_%.py,functional ops)
NATIVE := CMakeLists.txt setup.py $(wildcard kernels/*/*.cpp kernels/*/*.h bindings/*.cpp)
# What resolves versions, apart: it must run where the lock itself cannot be installed.
TOOLS := .venv-tools

# Environments share the source tree, where an editable installation writes.
.NOTPARALLEL:
.PHONY: help demo test test-all native test-native test-native-plain test-native-address test-native-thread test-arm test-versions test-floor test-newest test-oldest-torch test-gpu-versions gpu-cache lock check format bench clean FORCE

help: ## Shows this list
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 26

demo: $(VENV)/ready ## Runs the main job in a few minutes; pictures and data go to demo_out/
	$(BIN)/tokenmix demo

test: $(VENV)/ready ## Runs the test suite
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: $(VENV)/ready ## Runs the test suite and the tests that take too long for every day
	$(BIN)/python -m pytest -n auto

native: $(VENV)/packages ## Builds the native library, or fails
	$(BIN)/python setup.py build_native --inplace --strict

test-native: test-native-plain test-native-address test-native-thread ## Tests the kernels without PyTorch, also under sanitizers

test-native-plain test-native-address test-native-thread: test-native-%: $(VENV)/packages
	$(call ctest,$*)

test-arm: $(VENV)/packages ## The same for 64-bit Arm: needs g++-aarch64-linux-gnu and qemu-user
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { echo \
	"expected $$tool: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(call ctest,arm)

# $(call ctest,preset): builds and tests as that preset of CMakePresets.json says.
define ctest
	$(BIN)/cmake --preset $(1)
	$(BIN)/cmake --build --preset $(1) -j $$(nproc)
	$(BIN)/ctest --preset $(1) -j $$(nproc)
endef

test-versions: test-floor test-newest test-oldest-torch ## Tests third-party interfaces at the lowest and newest versions

test-floor test-newest: test-%: .venv-%/ready ## The same at one end
	.venv-$*/bin/python -m pytest -n auto -m interfaces

test-oldest-torch: $(VENV)/ready .venv-torch/packages ## Tests the native library of this torch at the lowest one
	.venv-torch/bin/python -m tokenmix_ops.video.cli explain
	.venv-torch/bin/python -m pytest -n auto -m "not slow" $(NATIVE_TESTS)

test-gpu-versions: .venv-gpu/ready ## Tests the kernels without a GPU, at the GPU machine's versions
	.venv-gpu/bin/python -m pytest -n auto -m "not slow" $(GPU_TESTS)

gpu-cache: .venv-gpu/ready ## Compiles the kernels that a lease calls, without a GPU, into gpu-cache.tar.xz
	.venv-gpu/bin/python -m bench cache

lock: $(TOOLS)/ready ## Writes requirements.lock with the newest versions that pyproject.toml allows
	$(TOOLS)/bin/python tools/lock.py lock "$(LOCKED_TORCH)" requirements.lock

check: $(VENV)/ready ## Formatting, lint, types, import floors, rendered numbers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py
	$(BIN)/python -m bench render --check

format: $(VENV)/ready ## Formats the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/ready ## Times operator and layer against their peers, with pytest-benchmark
	$(BIN)/python -m pytest bench --benchmark-only

clean: ## Removes the environments, what the demo wrote and what was built
	rm -rf $(VENV) $(TOOLS) .venv-floor .venv-newest .venv-torch .venv-gpu .gpu-cache gpu-cache.tar.xz demo_out \
	build tokenmix_ops/lib

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# $(call new,folder): an empty environment.
define new
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("expected Python >= 3.11, which \
	PyAV needs, got " + sys.version.split()[0] + ": choose one with PYTHON=")'
	$(PYTHON) -m venv --clear $(1)
endef

# $(call packages,folder,pins): an environment of these versions, except where torch excludes one.
define packages
	$(call new,$(1))
	$(1)/bin/python $(PIP_INSTALL) --no-deps --constraint $(2) setuptools packaging "$(TORCH)"
	$(1)/bin/python tools/lock.py fit $(2) > $(1)/pins.txt
	$(1)/bin/python $(PIP_INSTALL) --requirement $(1)/pins.txt torch
endef
project := $(PIP_INSTALL) --no-deps --no-build-isolation --editable .

# $(call of_torch,stamp,torch): FORCE if the environment of that stamp was built with another torch.
of_torch = $(if $(filter-out $(2),$(shell cat $(1) 2>/dev/null)),FORCE)

$(VENV)/packages: requirements.lock $(call of_torch,$(VENV)/packages,$(TORCH))
	$(call packages,$(VENV),requirements.lock)
	echo "$(TORCH)" > $@

$(VENV)/ready: $(VENV)/packages pyproject.toml $(NATIVE)
	$(BIN)/python $(project)
	touch $@

.venv-floor/packages .venv-newest/packages: .venv-%/packages: $(TOOLS)/%.txt
	$(call packages,.venv-$*,$<)
	echo "$(TORCH)" > $@

.venv-floor/packages: $(call of_torch,.venv-floor/packages,$(TORCH))
.venv-newest/packages: $(call of_torch,.venv-newest/packages,$(TORCH))

.venv-floor/ready .venv-newest/ready: .venv-%/ready: .venv-%/packages pyproject.toml $(NATIVE)
	.venv-$*/bin/python $(project)
	touch $@

# It runs the library that $(VENV)/ready has built, so the project is not installed.
.venv-torch/packages: TORCH := $(OLDEST_TORCH)
.venv-torch/packages: requirements.lock $(call of_torch,.venv-torch/packages,$(OLDEST_TORCH))
	$(call packages,.venv-torch,requirements.lock)
	echo "$(TORCH)" > $@

# CUDA's libraries make it gigabytes large, so only the two targets that say so build it.
.venv-gpu/packages: tools/gpu.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { echo \
	'expected Python 3.12, as on the GPU machine, at $(PYTHON312): name one with PYTHON312='; exit 1; }
	$(PYTHON312) -m venv --clear .venv-gpu
	.venv-gpu/bin/python $(PIP_INSTALL) --requirement $<
	touch $@

.venv-gpu/ready: .venv-gpu/packages pyproject.toml $(NATIVE)
	.venv-gpu/bin/python $(project)
	touch $@

$(TOOLS)/ready:
	$(call new,$(TOOLS))
	$(TOOLS)/bin/python $(PIP_INSTALL) "packaging>=24.2" "uv>=0.9"
	touch $@

# The index is asked each time; the file changes, and the environment is rebuilt, only if its answer did.
$(TOOLS)/floor.txt $(TOOLS)/newest.txt: $(TOOLS)/%.txt: $(TOOLS)/ready FORCE
	$(TOOLS)/bin/python tools/lock.py $* "$(LOCKED_TORCH)" $@
