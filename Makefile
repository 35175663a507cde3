# make demo: learn from real data and compare encodings. make test: everything the tests check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a test process: results repeat exactly for a fixed thread count only.
TEST_WORKERS ?= 2

.PHONY: demo test test-slow lint clean

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python pipelines/quickstart.py --out demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) -m "not slow and not spark"

test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) -m "slow and not spark"

lint: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo build *.egg-info
