# Every target sets up .venv by itself, once. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test files are shared out over this many processes, of one thread each: more would wait for cores.
TEST_PROCESSES ?= 2
READY := $(VENV)/.ready

.PHONY: quickstart test lint types bench clean help

help:
	@echo "make quickstart   train a small aligned generator on 3-D emoji and draw samples (about 6 min)"
	@echo "make test         run the tests"
	@echo "make lint types   ruff and mypy"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastrepa needs Python 3.11 or newer; set PYTHON=python3.x"; exit 1; }
	@echo "setting up $(VENV): about 6 GB of packages, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY)
	@$(BIN)/fastrepa train configs/quickstart.yaml

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/mypy engine kernels

clean:
	rm -rf $(VENV) build dist *.egg-info
