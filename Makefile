# Every target that needs the environment makes it first: .venv in this folder, set up once and reused while it is right.
PYTHON ?= python3
BIN := .venv/bin
# Python keeps its bytecode, also where the shell says otherwise: without it every process, and each worker of a run,
# compiles torch, transformers and vLLM again, for 20 s and more.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help env run smoke test test-slow test-kill gpu-check check

help:
	@echo 'make run        set up what is missing and run experiments/hh_compare.toml'
	@echo 'make smoke      the smallest experiment, from end to end'
	@echo 'make test       the tests                    (make test-slow: those that take minutes)'
	@echo 'make test-kill  a run that is killed at 40 moments ends as one that is not; half an hour'
	@echo 'make gpu-check  what only a CUDA GPU can show (docs/gpu.md); needs no environment and no network'
	@echo 'make check      ruff and mypy'
	@echo 'make env        only the environment'
	@echo 'ARGS="..."      is passed on: make run ARGS="--set seeds=[0]", make test ARGS="-k rrhf"'
	@echo 'PYTHON=...      another Python than python3: PYTHON=python3.12 make run'
	@echo 'VLLM=cpu|gpu    another vLLM than the one for the hardware found here: VLLM=gpu make env on a login node'

env:
	@$(PYTHON) scripts/environment.py $(VLLM)

run: env
	$(BIN)/rrhf-bench run experiments/hh_compare.toml $(ARGS)

smoke: env
	$(BIN)/rrhf-bench run experiments/smoke.toml $(ARGS)

# Files of tests are shared out to a process for each core, four at most (some hold a vLLM engine), of one thread each.
test: env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: env
	$(BIN)/pytest -m 'slow and not gpu' $(ARGS)

test-kill: env
	$(BIN)/pytest -m kill -s $(ARGS)

# Makes no environment: the first part needs none of its own, and a machine with a GPU may have no network.
gpu-check:
	@status=0; $(firstword $(wildcard $(BIN)/python) $(PYTHON)) scripts/gpu_check.py $(ARGS) || status=$$?; \
	if [ $$status = 2 ]; then exit 2; fi; \
	if [ -x $(BIN)/pytest ]; then $(BIN)/pytest -m gpu -rs || status=1; \
	else echo 'Without .venv the tests of vLLM do not run: make env makes it'; fi; exit $$status

check: env
	$(BIN)/ruff check .
	$(BIN)/mypy
