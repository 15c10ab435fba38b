# What people do here; `make` alone lists it. Everything runs in .venv, which `make install` makes.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
KERNELS := server/loramux_server/kernels
SOURCES := $(wildcard $(KERNELS)/compiled/csrc/*.cpp $(KERNELS)/compiled/csrc/*.h $(KERNELS)/compiled/csrc/exact/*)
SERVE_ARGS ?= --preload adapters/examples
LOAD_ARGS ?= run --spawn
TEST_ARGS ?=
# a machine with a GPU: PyTorch for CUDA is there, and what is missing lies as wheels in dist/gpu
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_ARGS ?= $(if $(wildcard dist/gpu/*.whl),$(if $(wildcard $(BIN)/python),,--wheels dist/gpu))
WHEEL_ARGS ?=
ISA ?= $(if $(filter x86_64 amd64,$(shell uname -m)),avx2,neon)

.PHONY: help install serve spam check test clients test-isa test-cards test-gpu gpu gpu-wheels wheel load clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf 'make %-10s %s\n' "$$name" "$$text"; done

install: $(STAMP) ## make .venv with tested versions of everything; done once, again when the pins change
	@echo "installed in .venv"

serve: $(STAMP) ## start a server on 127.0.0.1:8000 with the embedded base and the example adapters
	@exec $(BIN)/loramux serve $(SERVE_ARGS)

spam: $(STAMP) ## the whole story: fetch SMS Spam, train, score, serve, ask an adapter; 15 minutes
	@$(BIN)/python adapters/examples/spam_story.py

check: $(STAMP) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(STAMP) ## every test that needs no GPU; TEST_ARGS="tests/server/config -k loopback" runs some
	@$(BIN)/pytest $(if $(TEST_ARGS),$(TEST_ARGS),--cov -n 2 --dist loadfile)

clients: $(STAMP) ## other people's clients against a real server, each in .clients/; CLIENTS=openai, say
	@$(BIN)/pytest tests/clients $(if $(CLIENTS),-k "$(CLIENTS)")

test-isa: $(STAMP) ## the end-to-end tests on a lower instruction set: ISA=avx2, say; TEST_ARGS as above
	@LORAMUX_ISA=$(ISA) $(BIN)/pytest $(or $(TEST_ARGS),tests/e2e)

test-cards: $(STAMP) ## compile the kernels in Triton for every card; needs no GPU, some minutes
	@PYTHONPATH=server:adapters:tests $(BIN)/python -m support.compiled_kernels

test-gpu: $(STAMP) ## the tests that need a CUDA device, and the kernels' own, compiled
	@$(BIN)/pytest tests/gpu tests/adapters/device tests/adapters/lora/test_slot_copy.py tests/server/kernels/gpu

gpu: ## tests, step times and a server on a CUDA device (8 minutes); GPU_ARGS="--dry"
	@$(GPU_PYTHON) -m loadtests gpu $(GPU_ARGS)

gpu-wheels: $(STAMP) ## fill dist/gpu for a machine without network; WHEEL_ARGS="--python 3.12 --cuda 130"
	@$(BIN)/python -m loadtests.gpu.wheels $(WHEEL_ARGS)

wheel: $(STAMP) ## make a wheel, install it in an empty environment, ask it one thing; minutes
	@$(BIN)/python tests/wheel/try_wheel.py

load: $(STAMP) ## load test over HTTP on a server of its own, 10 minutes; LOAD_ARGS="--help": more
	@$(BIN)/python -m loadtests $(LOAD_ARGS)

clean: ## remove .venv, build results and caches; adapter store and converted base stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	rm -f $(KERNELS)/compiled/_kernels.so

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "loramux needs Python 3.11 or newer; set PYTHON=python3.11, say"; exit 1; }
	@echo "1/3 environment in .venv ($$($(PYTHON) -V))"
	@$(PYTHON) -m venv .venv
	@echo "2/3 packages at the versions in constraints.txt; a first time takes minutes, PyTorch is most of it"
	@$(BIN)/pip install --disable-pip-version-check --progress-bar off --log .venv/install.log \
			-c constraints.txt -e '.[train,dev]' 2>&1 \
		| sed -un -e 's/^ *Downloading \([^ ]*\) (\([0-9.]* [MG]B\)).*/    \1  \2/p' \
			-e 's/^ *Building editable for loramux .*started.*/    compiling the CPU kernels, about a minute/p' \
			-e 's/^Installing collected packages.*/    installing them/p' -e '/ERROR/p' \
		|| { echo "could not install; .venv/install.log says why"; exit 1; }
	@ls $(KERNELS)/compiled/_kernels.so > /dev/null 2>&1 \
		&& echo "3/3 CPU kernels compiled" \
		|| echo "3/3 CPU kernels not compiled (no C++ compiler?): the slower tensor path will be used"
	@touch $(STAMP)
