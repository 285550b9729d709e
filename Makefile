# make demo: set up and run the main job.  make test: set up and run all tests.  VENV=DIR puts the environment elsewhere.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Written last, so that an interrupted installation is taken up again.
READY = $(VENV)/.palimpsest-ready

SMALL = small-vit small-convnext small-swin

.PHONY: demo test lint format index $(SMALL) clean

demo: $(READY)
	$(BIN)/python main.py --config exps/quickstart.json --resume

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

index: $(READY)
	$(BIN)/python main.py --index exps

# The bundled networks, pre-trained anew.
$(SMALL): small-%: $(READY)
	$(BIN)/python main.py --config exps/pretrain/small_$*.json --resume
	$(BIN)/python -m convs.export runs/pretrain/small_$*/seed1993/checkpoint/last.pt data/small_$*.safetensors

$(READY): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Palimpsest needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
