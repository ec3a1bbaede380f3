# `make demo` and `make test` install what they need into .venv; the stamp keeps the second call fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check install

demo: $(STAMP)
	$(BIN)/trl-llava demo --output_dir runs/demo

# One thread per worker: the models of the tests are too small to gain from more.
test: $(STAMP)
	@CI=true OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pydoclint trl_llava
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,qlora,deepspeed]"
	touch $@
