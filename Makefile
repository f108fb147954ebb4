# From a fresh clone, with Python >= 3.11, git and make:
#   make distill   the main job: distill the embedded digits, 10 images a class
#   make test      the tests, two files at a time;  ARGS='-k barycenter' goes to pytest, ARGS='-n 0 --pdb' works in one process
#   make test-fast what starts no Ray: the mathematics, the options, storage, the data set
#   make chaos     200 kills of drivers, workers, nodes and heads, about an hour; WMDD_CHAOS_SEED, WMDD_CHAOS_KILLS
#   make fuzz      42,000 damaged and hostile files and sets, some minutes; WMDD_FUZZ_MUTANTS of each kind
#   make lint      ruff and mypy
#   make docs      the pages as a site in build/docs, with the docstrings and the notebook, which it runs
#   make bench ARGS=barycenter    measure this machine; also: recover, features, orchestration
#   make clean     remove the environment and caches, never results
VENV ?= .venv
PYTHON ?= python3
ARGS ?=
PIP_FLAGS ?=

BIN := $(VENV)/bin
FAST := tests/core tests/store tests/spine $(addprefix tests/test_,architecture.py config.py dataset.py documents.py errors.py options.py)
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: distill test test-fast chaos fuzz lint docs bench clean

distill: $(STAMP)
	$(BIN)/python jobs/distill.py --ipc 10 $(ARGS)
	@echo && echo "for the commands that follow: source $(BIN)/activate"

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(FAST) $(ARGS)

chaos: $(STAMP)
	$(BIN)/python -m pytest tests/chaos -m chaos_long -s $(ARGS)

fuzz: export WMDD_FUZZ_MUTANTS ?= 3000
fuzz: $(STAMP)
	$(BIN)/python -m pytest tests/store/test_fuzz.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy wmdd_ray jobs tests

docs: $(STAMP)
	$(BIN)/python -m sphinx -W -q -c .ci/docs . build/docs
	@echo "open build/docs/index.html"

bench: $(STAMP)
	$(BIN)/python jobs/bench.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The project itself is not installed: jobs/ and tests/ find it in the checkout, so the code that runs is the code here.
$(STAMP): requirements.txt requirements-run.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed and $(PYTHON) is older; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing requirements.txt into $(VENV) (about 5 GB, a few minutes; once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@touch $@
