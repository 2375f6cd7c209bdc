# make demo    all of it in ten minutes, ending with demo/report.html
# make test    lint and tests
# make lint    ruff, mypy
# make bench   kernels beside their peers
# make clean   remove the environment and what was made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test test-fast lint bench logs clean

install: $(VENV)/.stamp

$(VENV)/.stamp: setup.cfg constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}; set PYTHON=")'
	@sh tools/system_libraries.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,nuscenes,onnx,search]"
	@touch $@

demo: install
	$(BIN)/wm demo -o demo

# a file's tests stay together, since they share what its fixtures trained
test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-fast: install
	$(BIN)/python -m pytest -q -x -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/wm bench

# real logs for the tests: LOGS_FROM is an unpacking script, the folder is named by WM_TEST_LOGS
logs: install
	$(BIN)/python $(LOGS_FROM) "$(WM_TEST_LOGS)"

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
