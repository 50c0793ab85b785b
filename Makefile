# make demo       pretrain a small hybrid model on this machine, in a fresh virtual environment
# make test       the CPU test suite, likewise
# make test-gpu   the tests that need a GPU; those over NCCL run where there are two or more
# make slurm      install Slurm, for the launcher's tests, where there is apt and this is root
# make browser    install Chromium, for the test of minimax-report, likewise
# make lint       ruff, lint and format; pyrefly, the type checker
# make hooks      lint and format before every commit
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that make test starts, a file of tests at a time; many tests start several ranks.
WORKERS ?= 2

.PHONY: demo test test-gpu slurm browser lint hooks install install-cuda a-gpu clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed
install-cuda: $(VENV)/.installed-cuda

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

$(VENV)/.installed-cuda: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cuda]'
	touch $@

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-gpu: install a-gpu install-cuda
	$(BIN)/pytest -m gpu -rs

slurm:
	@if command -v slurmctld >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2; \
	else echo "make slurm: needs root and apt; the tests that need Slurm are skipped"; fi

browser:
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium fonts-dejavu-core; \
	else echo "make browser: needs root and apt; the tests that need a browser are skipped"; fi

a-gpu: install
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make test-gpu: no CUDA device found')"

# Two processes train on the Python standard library's sources; then the result is converted and opened in transformers.
demo: install
	rm -rf runs/demo runs/demo-hf
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/torchrun.sh --standalone --nproc-per-node=2 -- experiment=demo
	$(BIN)/minimax-convert to-hf runs/demo runs/demo-hf
	$(BIN)/python -P -m minimax_train.convert.sample runs/demo-hf "def __init__(self"
	@echo "loss curve: runs/demo/loss.png   checkpoint: runs/demo/checkpoints   Hugging Face export: runs/demo-hf"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

hooks: install
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist ./*.egg-info
