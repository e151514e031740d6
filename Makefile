# Everything a newcomer types. Each target sets up what it needs: see .ci/environment.py.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml cbam_cuda/version.py

.PHONY: demo test bench lint build emulator traffic mutate cuda-code cuda-link gpu clean
.DELETE_ON_ERROR:

## Train on real digits with the plain and the fused block, and print the speed of both.
demo: build
	$(BIN)/python -m examples.digits

# What reaches every line of the Python package. Counting lines slows tests down, those that compile a
# model most of all, so the others, which do or run kernels most of the time, go without.
SURFACE := $(patsubst %,tests/test_%.py,arguments modules layers norm convert convert_refused convert_halves ending backends plan backward derivatives)
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

## Formatters, linters, types, then the suite on every backend that runs here.
test: lint build emulator
	$(PYTEST) --cov --cov-report=term $(SURFACE) $(PYTEST_OPTIONS)
	$(PYTEST) $(SURFACE:%=--ignore=%) $(PYTEST_OPTIONS)
	$(BIN)/python -m benchmarks.guard

## The fused block against everything a user would pick instead, in less than 6 minutes; writes
## benchmarks/results. BENCH_OPTIONS=--quick takes less than one.
bench: build
	$(BIN)/python -m benchmarks $(BENCH_OPTIONS)

lint: .venv/.ready
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

build: .venv/.built

.venv/.ready: requirements-dev.txt .ci/environment.py
	$(PYTHON) .ci/environment.py
	touch $@

# Kernels are compiled for the GPUs of this machine; where there are none, for the first with clusters
# and bulk copies. `pip install .` compiles for five architectures, which `make cuda-code` looks at.
.venv/.built: .venv/.ready $(SOURCES)
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST-$$($(BIN)/python -m benchmarks.gpu.architecture \
		2> /dev/null || echo 9.0)}" \
		$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m cbam_cuda
	touch $@

## The CUDA kernels compiled for the CPU: backend "emulated".
emulator: build
	$(BIN)/python tests/emulator/build.py plain
	ln -sf ../build/emulator/plain/libcbam_emulated.so cbam_cuda/_emulated.so

## The bytes that the CUDA kernels move, counted on the emulator.
traffic: emulator
	$(BIN)/python tests/traffic.py $(TRAFFIC_OPTIONS)

## Breaks the CUDA kernels one line at a time: the emulator must notice every break.
mutate: emulator
	$(BIN)/python tests/mutate.py

## Builds for every architecture of an installed package, and reads there what the suite reads for one.
cuda-code: .venv/.ready
	TORCH_CUDA_ARCH_LIST= $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch .venv/.built
	$(PYTEST) tests/test_cuda_code.py $(PYTEST_OPTIONS)

## Builds and loads beside a CUDA build of PyTorch, which takes several gigabytes; needs no GPU.
cuda-link: build
	$(BIN)/python .ci/cuda_link.py

## The acceptance run on the GPU of this machine: tests, compute-sanitizer, checks, bytes moved, what a
## call costs the host, timings, a ResNet-50, variants of the block, and where resident kernels are the
## faster ones. Within 8 minutes, all that it installs and builds included.
gpu: STARTED := $(shell date +%s)
gpu: .venv/.ready
	rm -f .venv/.built  # it may be of another machine
	architectures=$$($(BIN)/python -m benchmarks.gpu.architecture) && \
		TORCH_CUDA_ARCH_LIST=$$architectures $(MAKE) build
	$(BIN)/python -m benchmarks.gpu --since $(STARTED) $(GPU_OPTIONS)

clean:
	rm -rf .venv .venv-cuda build dist *.egg-info cbam_cuda/*.so
