# make demo   train LoRA on the small model inside fitune and print what it learnt (a minute or two on two cores)
# make test   the whole suite, on CPU, without network
# make matrix every family x method x precision x checkpointing on tiny models; rewrites docs/results/matrix.md
# make check  style, types, import layers, size caps
#
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch's CPU builds instead of gigabytes of CUDA.
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: demo test matrix check format docs kill-test clean

# The stamp changes with the files that decide what is installed.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/fitune train examples/demo.yaml --replace
	$(BIN)/python examples/demo_table.py runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

matrix: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/matrix --cells all

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed
	$(BIN)/python scripts/make_docs.py

kill-test: $(VENV)/installed
	$(BIN)/python -m pytest tests/training/test_kill.py -k hundred --kills 100 -n 0

clean:
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache
