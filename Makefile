# Set-up, demo and tests. PYTHON is the interpreter (3.11 or 3.12) for the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Each of these tests runs several processes, which often wait for each other. The longest file goes first, though it
# has the fewest tests.
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder
# One test for each core: threads of their own would only wait for each other.
ONE_A_CORE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: help setup demo chat test test-all test-fast chaos lint clean

help:
	@echo "make setup      .venv, with everything that tests and viewer need"
	@echo "make demo       the whole pipeline on the Python standard library's source: 7 to 10 minutes on two cores"
	@echo "                (DEMO=--quick shows every stage in two minutes)"
	@echo "make chat       talk to the demo's model on a page in the browser"
	@echo "make test       the tests"
	@echo "make test-all   the tests, including those that take minutes each"
	@echo "make test-fast  the tests without the slow ones"
	@echo "make chaos      300 faults, and a check that the runs end as if undisturbed"
	@echo "make lint       ruff, and mypy over the rooms that pyproject.toml names"
	@echo "make clean      remove .venv and out/"

setup: $(READY)

$(READY): requirements.txt requirements-qlora.txt requirements-ssh.txt requirements-viewer.txt requirements-serve.txt \
		requirements-eval.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "zero2all needs Python 3.11 or 3.12: run make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV): some minutes, and 3 GB; pip prints nothing meanwhile"
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $(READY)

demo: $(READY)
	$(BIN)/python -m demo.run $(DEMO)

chat: $(READY)
	@test -d out/demo/dpo/ckpt || \
		{ echo "there is no model of the demo: run make demo first, or python serve.py --model RUN"; exit 2; }
	$(BIN)/python serve.py --model out/demo/dpo $(CHAT)

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(ONE_A_CORE) -m "not soak" tests/unit
	$(BIN)/python -m pytest $(TWO_FILES) -m "not soak" tests/chaos tests/dist tests/gpu

test-all: $(READY)
	$(ONE_A_CORE) tests/unit
	$(BIN)/python -m pytest $(TWO_FILES) tests/chaos tests/dist tests/gpu

test-fast: $(READY)
	$(ONE_A_CORE) -m "not slow and not soak" tests/unit
	$(BIN)/python -m pytest $(TWO_FILES) -m "not slow and not soak" tests/chaos tests/dist tests/gpu

chaos: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.chaos.campaign --seed 1 --faults 300

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out
