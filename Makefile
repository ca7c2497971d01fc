# make train   set up, then train the embedded checkpoint on rendered clips (DATA=DIR: on your own music) and listen
# make test    set up, then run the tests
# make bench   how fast small models are here; make bench-gpu: the real sizes (BENCH=training STAGES=xl: some)
# make style   format; make quality: check formatting and lint
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= tiny
DATA ?=
OUTPUT ?= output/make-train
STAGES ?=
BENCH ?=
SKYPILOT ?= .venv-skypilot
AUDIT = $(BIN)/python docker/audit.py docker/requirements.lock docker/requirements-cpu.lock
# Enough for the tiny checkpoint to move audibly; with a real one, use --preset c.
TRAIN_FLAGS ?= --max_train_steps 200 --learning_rate 1e-3
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $$(nproc)

.PHONY: help setup train test test-slow test-gpu serverless-test bench bench-gpu style quality audit clean \
	image-variables image-locks image-test

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST)) | head -4

$(VENV)/.installed: requirements.txt requirements-dev.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name it with PYTHON=python3.11." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "error: the venv module is missing; on Debian: apt-get install python3-venv." >&2; exit 2; }
	$(BIN)/pip install --disable-pip-version-check --quiet --requirement requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

setup: $(VENV)/.installed

ifeq ($(strip $(DATA)),)
train: DATA_DIR = output/demo-dataset
train: output/demo-dataset/demo.json
else
train: DATA_DIR = $(DATA)
endif
train: setup
	$(LAUNCH) train_ace_step_lora.py --preset smoke --pretrained_model_name_or_path $(MODEL) --train_data_dir "$(DATA_DIR)" \
		--output_dir $(OUTPUT) --overwrite_output_dir $(TRAIN_FLAGS)
	@echo
	@echo "With real weights and your own music:"
	@echo "  $(BIN)/accelerate launch train_ace_step_lora.py --preset c --train_data_dir DIR"

output/demo-dataset/demo.json: | $(VENV)/.installed
	$(BIN)/python examples/make_demo_dataset.py output/demo-dataset

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses auto --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu and not vendors"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# RunPod's, AWS's and Modal's own packages (260 MB); SkyPilot (530 MB), whose pins are its own, beside them.
$(VENV)/.serverless: requirements-serverless.txt $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check --quiet --requirement requirements-serverless.txt
	@touch $@

$(SKYPILOT)/.installed:
	$(PYTHON) -m venv $(SKYPILOT)
	$(SKYPILOT)/bin/pip install --disable-pip-version-check --quiet 'skypilot[lambda,runpod]==0.14.1'
	@touch $@

serverless-test: $(VENV)/.serverless $(SKYPILOT)/.installed
	SKYPILOT_PYTHON=$(abspath $(SKYPILOT)/bin/python) $(BIN)/python -m pytest -m vendors

# Results and tables are left in benchmarks/results, README.md and docs. A run that was cut goes on where it was.
bench bench-gpu: setup
	$(BIN)/python benchmarks/run.py --suite $(if $(filter bench-gpu,$@),gpu,cpu) $(if $(BENCH),--parts $(BENCH)) $(if $(STAGES),--stages $(STAGES))

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck docker/*.sh examples/*.sh
	$(BIN)/hadolint docker/Dockerfile.*
	$(AUDIT)

# The lock files' hashes, and what PyPI knows of vulnerabilities in what they pin.
audit: setup
	$(AUDIT)
	$(BIN)/uvx pip-audit==2.10.1 --strict --disable-pip --require-hashes --requirement docker/requirements.lock

# The image's files that are made of others, and the image itself, built and run without an engine (Debian, root).
image-variables: setup
	$(BIN)/python docker/write_variables.py

image-locks: setup
	UV=$(BIN)/uv docker/write_locks.sh

image-test: setup
	$(BIN)/python -m pytest docker/image_test.py

clean:
	rm -rf $(VENV) $(SKYPILOT) build *.egg-info
