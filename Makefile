# make demo: set up and run the main job.  make test: set up and run all tests but the long ones.  make quick: the quick
# round.  make long: each learner killed inside every task, and what else takes minutes.  VENV=DIR: the environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Written last, so that an interrupted installation is taken up again.
READY = $(VENV)/.palimpsest-ready

SMALL = small-vit small-convnext small-swin

# One process a core, one thread each: the tests' networks are too small for more.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: demo test quick long lint format index $(SMALL) clean

demo: $(READY)
	$(BIN)/python main.py --config exps/quickstart.json --resume

test: $(READY)
	$(PYTEST) -m "not long"

quick: $(READY)
	$(PYTEST) -m "not slow and not long"

long: $(READY)
	$(PYTEST) -m long

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

index: $(READY)
	$(BIN)/python main.py index exps

# The bundled networks, pre-trained anew.
$(SMALL): small-%: $(READY)
	$(BIN)/python main.py --config exps/pretrain/small_$*.json --resume
	$(BIN)/python main.py export runs/pretrain/small_$* data/small_$*.new.safetensors
	mv data/small_$*.new.safetensors data/small_$*.safetensors

$(READY): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Palimpsest needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
