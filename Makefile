# Each target creates .venv and installs what it needs; a second run skips that.
# Another interpreter: PYTHON=python3.12 make learn

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
LAB := $(VENV)/.installed-lab
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help learn test serve exercises lab clean install

help:
	@echo "make learn      run every chapter here, build the site from it, say where to open it"
	@echo "make test       everything that must pass: package, notebooks, exercises, site"
	@echo "make serve      the site at http://127.0.0.1:8000, built again as you edit"
	@echo "make exercises  check your answers in exercises/"
	@echo "make lab        JupyterLab on chapters/"
	@echo "make clean      remove build/ and site/"

# ------------------------------------------------------------------ installation
# A half-made environment is removed, so that the next run starts over instead of stumbling on it.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another with: PYTHON=python3.12 make ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot create virtual environments (on Debian and Ubuntu: apt install python3-venv)" >&2; \
	  exit 1; }

$(INSTALLED): requirements.txt pyproject.toml $(PY)
	@rm -f $@
	@echo "installing into $(VENV) (about a minute) ..."
	@$(PIP) -r requirements.txt -e .
	@touch $@

$(LAB): $(INSTALLED)
	@echo "installing JupyterLab ..."
	@$(PIP) -e ".[lab]"
	@touch $@

install: $(INSTALLED)

# ------------------------------------------------------------------ what one does
learn: $(INSTALLED)
	@$(PY) book/learn.py $(ARGS)

test: $(INSTALLED)
	@$(PY) -m ruff check .
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadfile $(ARGS)

serve: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve $(ARGS)

exercises: $(INSTALLED)
	@$(PY) -m pytest exercises $(ARGS)

lab: $(LAB)
	@$(PY) -m jupyter lab chapters $(ARGS)

clean:
	rm -rf build site site.old
