# Everything one does with httptrading; `make` alone lists it.

VENV ?= .venv
# The first Python on the PATH that is new enough; `make PYTHON=/path/to/python3.13 …` chooses.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CORE := $(VENV)/.core-installed
ALL := $(VENV)/.all-installed
# The tests mostly wait for timeouts and servers, so two at a time take half the time.
WORKERS ?= 2
MINUTES ?= 5
ORDERS ?= 10000

.PHONY: help run test check deploy-test torture soak bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(CORE) ## start the service on http://127.0.0.1:8080 (PORT=…, HTTPTRADING_CONFIG=…)
	@HTTPTRADING_SHOW_TOKEN=1 $(if $(PORT),HTTPTRADING_PORT=$(PORT)) exec $(BIN)/gunicorn

test: $(ALL) check ## linters, types and the whole test suite
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

check: $(ALL) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy reads the package as it is installed: each file under one name, httptrading.….
	@rm -rf build/typed && mkdir -p build/typed/httptrading
	@for part in httptrading/*.py httptrading/py.typed app brokers schemas; do \
		ln -s "$(CURDIR)/$$part" "build/typed/httptrading/$$(basename $$part)"; done
	cd build/typed && $(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy-cache

deploy-test: $(ALL) ## the service behind a real nginx with the shipped sample
	$(BIN)/python -m pytest -q tests/deploy

torture: $(ALL) ## kill the gateway again and again under ORDERS=10000 orders
	$(BIN)/python -m pytest -q -s tests/test_torture.py --orders $(ORDERS)

soak: $(ALL) ## all brokers under mixed load and random faults for MINUTES=5
	$(BIN)/python -m pytest -q -s tests/test_soak.py --minutes $(MINUTES)

bench: $(ALL) ## measure; writes bench/RESULTS.md
	PYTHONPATH=tests $(BIN)/python -m bench

clean: ## remove what make made, except the data directory
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "httptrading needs Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The core's own dependencies, in the tested versions, and no SDK.
$(CORE): pyproject.toml requirements.txt | $(BIN)/python
	@$(BIN)/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
		> $(VENV)/core-requirements.txt
	$(PIP) -c requirements.txt -r $(VENV)/core-requirements.txt
	@touch $@

$(ALL): requirements.txt requirements-dev.txt | $(BIN)/python
	$(PIP) -r requirements-dev.txt
	@touch $@ $(CORE)
