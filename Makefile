# make demo    train on real images, and time the loss against eager PyTorch: under two minutes of CPU
# make test    the test suite                make check   lint, format and types
# Each makes its own .venv with the versions in constraints.txt; nothing need be there before.

PYTHON ?= python3
BIN := .venv/bin
# Empty is unset: with bytecode kept, a test's child process starts in a third of the time.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt README.md \
	$(shell find relssl kernels csrc -type f -not -name '*.pyc' -not -name '* *')

.PHONY: demo test check clean

demo: .venv/installed
	$(BIN)/python bench/demo.py --out out/demo

# pytest's own script, not python -m: the package under test is the installed one, never the source folder.
test: .venv/installed
	$(BIN)/pytest $(ARGS)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build out *.egg-info

# torch first and by its exact version: anything else may choose a build of several gigabytes.
.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) '.[train,dev,bench]'
	touch $@
