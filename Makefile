# One command each. The environment is made on first use and reused while constraints.txt and
# pyproject.toml stay as they are.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# An environment that is there already: make test-gpu BIN=/usr/bin
ifeq ($(origin BIN),command line)
READY :=
endif
export DIFFUSERS_VERBOSITY ?= error
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-full test-gpu lint format bench-cpu bench-gpu clean

.venv/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch triton
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: $(READY)
	$(BIN)/python -m fxopt demo

# Two workers of one thread each: more would wait for each other. Each begins with half of the files,
# whose tests share captures.
test test-full: export OMP_NUM_THREADS ?= 1

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-full: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

# Most of the time goes into compiling some hundred variants of the kernels, on the host.
test-gpu: export OMP_NUM_THREADS ?= 1
test-gpu: WORKERS ?= 4
test-gpu: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m gpu

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-cpu: $(READY)
	$(BIN)/python -m bench.static --check
	$(BIN)/python -m bench.traffic --check
	$(BIN)/python -m bench.traffic --recipe fp8 --check
	$(BIN)/python -m bench.traffic --recipe fp8 --history 16 --check
	$(BIN)/python -m bench.traffic --recipe fp8 --saved fp8 --check
	$(BIN)/python -m bench.setup --check
	$(BIN)/python -m bench.cpu_step --check

# Results land in RESULTS after every case, named by the device. Together less than 10 minutes,
# though a case that has begun ends, which may take two for a block. All cases: without --seconds.
RESULTS ?= bench/results

bench-gpu: $(READY)
	$(BIN)/python -m bench.kernels --save $(RESULTS) --seconds 130
	$(BIN)/python -m bench.attention --save $(RESULTS) --seconds 60
	$(BIN)/python -m bench.blocks --save $(RESULTS) --seconds 130

clean:
	rm -rf .venv
