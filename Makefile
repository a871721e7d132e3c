# `make demo` and `make test` need nothing but Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-docs soak lint bench docs clean

demo: $(VENV)/.run
	$(BIN)/python -m scoring.demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 4 --max-worker-restart 0 --dist loadgroup --no-loadscope-reorder --durations 15

# What takes many rounds or a whole training; `make soak UNTIL=...` begins no test after that time, in seconds since 1970.
soak: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations 0 -rs -m soak $(if $(UNTIL),--until $(UNTIL)) tests

# What the pages show is done: each command and example, the notebook, the wheel outside the repository, the rendered pages.
test-docs: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations 15 -rs -m docs tests/pages

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy models pipelines scoring benchmarks planes_entry.py
	$(BIN)/lint-imports
	$(BIN)/deptry .

# The pages as a site, without network; a broken link or reference is an error.
docs: $(VENV)/.dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.masks
	$(BIN)/python -m benchmarks.comparison
	$(BIN)/python -m benchmarks.merging
	$(BIN)/python -m benchmarks.tiles
	$(BIN)/python -m benchmarks.field
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.viewer
	$(BIN)/python -m benchmarks.actors
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.gpu --rounds 5 --batches 1,4 --crops 1,20

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing packages (some 8 GB, a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --progress-bar on -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable . --config-settings editable_mode=compat
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --progress-bar on -r requirements-dev.txt
	@touch $@
