# Every target sets itself up: a virtual environment in .venv, once, and again when pyproject.toml or the lock changes.
# Needed: Linux, python3 (3.11 or later) with pip, gcc and g++. Nothing is installed outside this folder.
#
# What is installed is what the lock says, and torch in the version TORCH. To try another torch beside it:
#     make VENV=.venv-torch214 TORCH=2.14.1 test
# LOCK= and TORCH=, both empty, take the newest that pyproject.toml allows:
#     make VENV=.venv-latest LOCK= TORCH= test

VENV     ?= .venv
PYTHON   ?= python3
TORCH    ?= 2.13.0
LOCK     ?= requirements/lock.txt
RECIPE   ?= flux-fast
MODEL    ?= shapes
PROMPT   ?= a large red star left of a small blue circle on a white background
SEED     ?= 0
ARTIFACT ?= artifacts/$(RECIPE)-$(notdir $(patsubst %/,%,$(MODEL)))
PICTURE  ?= artifacts/demo.png
PYTEST   ?= -n 2 --dist loadfile

export PROMPT
python  = $(VENV)/bin/python
prebake = $(VENV)/bin/prebake
pip     = $(PYTHON) -m pip --python $(python) install --quiet --disable-pip-version-check $(LOCK:%=--constraint %)
step    = @printf '\n\033[1m%s\033[0m\n'

.PHONY: help demo test quick test-all fuzz faults works docs lint format install lock clean
.NOTPARALLEL:

help:
	@echo 'make demo     export RECIPE=$(RECIPE) on MODEL=$(MODEL), verify it, and draw PROMPT into $(PICTURE)'
	@echo 'make test     run the tests'
	@echo 'make quick    run those that compile nothing, in a minute or two'
	@echo 'make test-all run all of them, also those that take minutes'
	@echo 'make fuzz     damage artifacts at random, 23,400 times, and load each'
	@echo 'make faults   run the tests of all that can go wrong, and write the table in docs/reference/faults.md'
	@echo 'make works    run the tests of what each family can do, and write the table in docs/reference/families.md'
	@echo 'make docs     build the documentation into site/'
	@echo 'make lint     run ruff and the type checker'
	@echo 'make format   let ruff format and sort what it can'
	@echo 'make lock     write $(LOCK) anew, with the newest that pyproject.toml allows'
	@echo 'make clean    remove .venv and the artifacts that are not in git'

# Always exports anew, so that what you see comes from the code as it is now: nothing of it from the export cache.
demo: $(VENV)/installed
	$(step) 'export: $(RECIPE) on $(MODEL)'
	$(prebake) export --recipe $(RECIPE) --model $(MODEL) --output $(ARTIFACT) --force --no-cache $(EXPORT)
	$(step) 'verify: its golden vectors, replayed'
	$(prebake) verify $(ARTIFACT)
	$(step) "run: $$PROMPT"
	$(prebake) run $(ARTIFACT) "$$PROMPT" --seed $(SEED) --output $(PICTURE)
	$(step) 'Done. The picture is $(PICTURE), the artifact is $(ARTIFACT). Another one:'
	@echo "    $(VENV)/bin/prebake run $(ARTIFACT) 'a small green heart above a large pink square' --output another.png"

test: $(VENV)/installed
	$(python) -m pytest $(PYTEST)

# Between two edits: nothing is compiled, no whole model runs, and no page is held to the code. Of one folder, models too:
#     make quick PYTEST='tests/exporter/caches -m "not slow and not compiles"'
quick: $(VENV)/installed
	$(python) -m pytest -m 'not slow and not compiles and not docs and not peers' $(PYTEST)

# With the slow ones: every recipe compiled on its tiny model, among others.
test-all: $(VENV)/installed
	$(python) -m pytest $(PYTEST) -m ''

# Another 2,000 for each of six kinds of damage and 11,400 contradictions at every run; `make test` does the same 100 each.
fuzz: $(VENV)/installed
	PREBAKE_FUZZ=2000 $(python) -m pytest tests/runtime/check/test_fuzz.py

# Writes into docs/reference/faults.md what the tests show. `ONLY='-k memory'` runs some, and leaves the rest of the page as it is.
faults: $(VENV)/installed
	$(python) -m pytest $(PYTEST) -m '' tests/faults tests --faults-page=docs/reference/faults.md $(ONLY)

# Writes into docs/reference/families.md what the tests show.
works: $(VENV)/installed
	$(python) -m pytest $(PYTEST) -m works --works-table=docs/reference/families.md

# Strict: a page out of the navigation or a broken link ends it. `make docs SERVE=1` shows it at localhost:8000.
docs: $(VENV)/installed
	$(python) -m mkdocs $(if $(SERVE),serve,build --strict --clean)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(python)

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

install: $(VENV)/installed

# For Python 3.11 to 3.13, from a python3.11: make lock PYTHON=python3.11. Takes some minutes, and installs nothing.
lock:
	$(PYTHON) requirements/lock.py $(TORCH)

# torch comes first and only if there is none, so that a build that you chose yourself (CPU, a certain CUDA) stays.
# prebake is built with the setuptools of the environment: one that pip fetches for itself would be under no lock.
$(VENV)/installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'prebake needs Python 3.11 or later, and $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || \
		{ echo '$(PYTHON) has no pip: apt-get install python3-pip' >&2; exit 1; }
	@for tool in gcc g++; do command -v $$tool >/dev/null || \
		{ echo "prebake compiles graphs with $$tool, and there is none: apt-get install gcc g++" >&2; exit 1; }; done
	@test -x $(python) || $(PYTHON) -m venv --without-pip $(VENV) || \
		{ echo '$(PYTHON) cannot make a virtual environment: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Installing into $(VENV): some minutes the first time.'
	@test -z '$(TORCH)' || $(python) -c 'import torch' 2>/dev/null || $(pip) 'torch==$(TORCH)'
	@$(pip) pip setuptools
	@$(pip) --no-build-isolation --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
	find artifacts -mindepth 1 -maxdepth 1 ! -name README.md ! -name demo.png -exec rm -rf {} +
