# Every target sets up .venv by itself, once. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test files are shared out over this many processes, of one thread each: more would wait for cores.
TEST_PROCESSES ?= 2
READY := $(VENV)/.ready

# What a borrowed GPU machine has, in a folder of its own: made once, by a Python 3.12.
PYTHON312 ?= python3.12
GPU_IMAGE ?= .gpu-image
IMAGE_READY := $(GPU_IMAGE)/.ready

# pip, with a line for each large package that it fetches: silent it looks hung, and its own way is
# hundreds of lines. The status is pip's.
define pip_install
{ $(1)/bin/python -m pip install --progress-bar off --disable-pip-version-check $(2); echo $$? >$(1)/.pip; } | \
	while read -r line; do case $$line in \
		*[0-9][0-9].[0-9]' MB)' | *' GB)') echo "  $$line" ;; \
		'Installing collected'*) echo "  Unpacking, a minute or two" ;; \
	esac; done; exit $$(cat $(1)/.pip)
endef

.PHONY: quickstart test lint types mutations gpu-wheels gpu-image gpu-rehearsal browser clean help

help:
	@echo "make quickstart   train a small aligned generator on 3-D emoji and draw samples (about 6 min)"
	@echo "make test         run the tests"
	@echo "make lint types   ruff, the laws of imports (pyproject.toml), and mypy"
	@echo "make mutations    break the code line by line: each time a test must fail (about 10 min; ONLY=WORDS: some)"
	@echo "make browser      Debian's chromium, in which the pages of report and watch are tested (apt; as root)"
	@echo "make gpu-wheels   .gpu-wheels: what a borrowed GPU machine lacks (DALI=1: .gpu-dali too)"
	@echo "make gpu-rehearsal  what is measured there, at toy shapes on this CPU, with what can go wrong"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastrepa needs Python 3.11 or newer; set PYTHON=python3.x"; exit 1; }
	@echo "setting up $(VENV): about 6 GB of packages, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call pip_install,$(VENV),-c constraints.txt -e '.[dev]')
	@touch $@

quickstart: $(READY)
	@# Ctrl-C is no error; the trap keeps the shell until the run has saved.
	@trap : INT; $(BIN)/fastrepa train configs/quickstart.yaml || { code=$$?; [ $$code = 130 ] || exit $$code; }

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYTHONPATH=engine:kernels $(BIN)/lint-imports

types: $(READY)
	@$(BIN)/mypy engine kernels

# Without one, the tests in a browser are skipped.
browser:
	@command -v chromium > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; }

# Outside CI: what it asks is whether the tests would notice.
mutations: $(READY)
	@$(BIN)/python -m tests.mutations --jobs $(TEST_PROCESSES) $(ONLY)

gpu-wheels:
	@$(PYTHON) -m benchmarks.gpu_suite.wheels fetch $(if $(DALI),--dali)

gpu-image: $(IMAGE_READY)

$(IMAGE_READY): benchmarks/gpu_image.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo "a borrowed GPU machine has Python 3.12; set PYTHON312=python3.12"; exit 1; }
	@echo "setting up $(GPU_IMAGE): about 5 GB of packages, once"
	@test -x $(GPU_IMAGE)/bin/python || $(PYTHON312) -m venv $(GPU_IMAGE)
	@$(call pip_install,$(GPU_IMAGE),-r $<)
	@# typer brings pydantic along, which that machine does not have
	@$(GPU_IMAGE)/bin/python -m pip uninstall --quiet --yes \
		pydantic pydantic_core annotated-types typing-inspection
	@touch $@

gpu-rehearsal: $(IMAGE_READY) gpu-wheels
	@$(GPU_IMAGE)/bin/python -m benchmarks.gpu_suite.rehearsal --wheels .gpu-wheels

clean:
	rm -rf $(VENV) $(GPU_IMAGE) .gpu-wheels .gpu-dali build dist *.egg-info
