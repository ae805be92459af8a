# Every target that needs the environment makes it first: .venv in this folder, set up once and reused while it is right.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help env run smoke test test-slow test-kill gpu-check check

help:
	@echo 'make run        set up what is missing and run experiments/hh_compare.toml'
	@echo 'make smoke      the smallest experiment, from end to end'
	@echo 'make test       the tests                    (make test-slow: those that take minutes)'
	@echo 'make test-kill  a run that is killed at 40 moments ends as one that is not; half an hour'
	@echo 'make gpu-check  the tests that need a CUDA GPU; without one it says so'
	@echo 'make check      ruff and mypy'
	@echo 'make env        only the environment'
	@echo 'ARGS="..."      is passed on: make run ARGS="--set seeds=[0]", make test ARGS="-k rrhf"'
	@echo 'PYTHON=...      another Python than python3: PYTHON=python3.12 make run'
	@echo 'VLLM=cpu|gpu    another vLLM than the one for the hardware found here: VLLM=gpu make env on a login node'

env:
	@$(PYTHON) scripts/environment.py $(if $(VLLM),--vllm $(VLLM))

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

# The line that `env` prints says why there is no GPU to check on.
gpu-check: env
	@if grep -q '"machine": "gpu"' .venv/setup.json; then $(BIN)/pytest -m gpu -rs $(ARGS); \
	else echo 'Skipped: no CUDA GPU on this machine, so nothing to check here'; fi

check: env
	$(BIN)/ruff check .
	$(BIN)/mypy
