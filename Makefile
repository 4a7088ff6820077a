# Every target works on its own: each one builds the virtual environment first if it has to.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: record test bench profile lint clean
.DEFAULT_GOAL := record

record: $(READY)
	$(BIN)/python -m trainer

test: $(READY)
	$(BIN)/python -m pytest verify

bench: $(READY)
	$(BIN)/python -m pytest bench

profile: $(READY)
	$(BIN)/python -m profiles step

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# nvidia-cutlass is wanted for its C++ headers alone: --no-deps leaves out its Python bindings.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps nvidia-cutlass==4.2.0.0
	touch $@

clean:
	rm -rf $(VENV) .cache runs
