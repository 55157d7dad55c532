# demo, test, check, bench: nothing else. The environment is made on the first call.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: demo test check bench

demo: $(READY)
	rm -rf demo && $(BIN)/hilum demo --out demo

test: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: $(READY)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[test,check]" -c requirements.lock
	-$(BIN)/python pipeline/outputs/_viewer/build.py  # pip swallows what a build says: here it is heard
	touch $@
