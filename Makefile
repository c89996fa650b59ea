# Needs Python 3.11 or newer and make; everything else is installed into $(VENV).
#
#   make demo         train a small model on 8 virtual devices
#   make test         the quick tests
#   make test-slow    the slow ones
#   make smoke        the smallest subset, for another Python: make smoke PYTHON=python3.13 VENV=.venv-3.13
#   make lint         ruff and mypy
#   make format       let ruff rewrite what it can
#   make docs         build the site into docs/_build/html, tutorials executed
#   make docs-tables  put benchmarks/results into README.md and docs
#   make clean        remove everything that can be made again

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
# Further requirements for $(VENV), such as 'jax>=0.11'.
REQUIRE ?=

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed-docs
PYTEST    := $(BIN)/python -m pytest -n $(WORKERS)
# pytest exits with 5 when a subset has no tests.
NONE_IS_FINE := || [ $$? -eq 5 ]

.PHONY: demo test test-slow smoke lint format docs docs-tables install clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/alpa-lite train

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m slow $(NONE_IS_FINE)

smoke: $(INSTALLED)
	$(PYTEST) -m smoke

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED_DOCS)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

docs-tables:
	$(PYTHON) -m benchmarks.make_tables

install: $(INSTALLED)

# Tried twice, because downloads fail; what pip has finished is kept between the tries.
$(INSTALLED): pyproject.toml alpa_lite/version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "alpa-lite needs Python 3.11 or newer, found $$($(PYTHON) --version); set PYTHON" >&2; exit 1; }
	@echo "Installing into $(VENV); this takes a minute or two."
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@install() { $(BIN)/python -m pip install --disable-pip-version-check -qq $(REQUIRE:%='%') -e '.[test]'; }; \
	    install || { echo "Trying once more." >&2; sleep 5; install; }
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check -qq -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache docs/_build
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
