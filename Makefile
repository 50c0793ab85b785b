# make demo   pretrain a small hybrid model on this machine, in a fresh virtual environment
# make test   the CPU test suite, likewise
# make lint   ruff
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

test: install
	$(BIN)/pytest

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

clean:
	rm -rf $(VENV) build dist ./*.egg-info
