# Everything one does with httptrading; `make` alone lists it.

VENV ?= .venv
# The first Python on the PATH that is new enough; `make PYTHON=/path/to/python3.13 …` chooses.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(abspath $(VENV))/bin
# pip would compile on one processor, and the SDKs' own tests too, which takes half its time.
PIP := -m pip --disable-pip-version-check install --quiet --no-compile
COMPILE := -m compileall -q -j 0 -x 'site-packages/.*/tests?/'
CORE := $(VENV)/.core-installed
CORE_ONLY := $(VENV)/core-requirements.txt
ALL := $(VENV)/.all-installed
# ib_async is ib_insync's successor. Both bring a package "eventkit", so each has an environment of
# its own, and the tests of the adapter run in both.
IB_ASYNC := .venv-ib-async
IB_TESTS := tests/test_tws_simulator.py tests/test_ib_book.py tests/test_trading_hours.py \
	tests/test_interactive_brokers.py
# The tests mostly wait for timeouts and servers, so more run at a time than there are CPUs.
WORKERS ?= 8
AT_ONCE := --dist worksteal
MINUTES ?= 5
ORDERS ?= 10000

# Half a virtual environment (Debian without python3-venv makes one) is no environment.
.DELETE_ON_ERROR:

.PHONY: help run test check suite ib-async-suite deploy-test torture soak bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(CORE) ## start the service on http://127.0.0.1:8080 (PORT=…, HTTPTRADING_CONFIG=…)
	@HTTPTRADING_SHOW_TOKEN=1 $(if $(PORT),HTTPTRADING_PORT=$(PORT)) exec $(BIN)/gunicorn

# Compiled once and kept, whatever the caller's environment says: each worker and each service that
# tests and measurements start would compile everything anew.
test bench: export PYTHONDONTWRITEBYTECODE =
test: ## linters, types and the whole test suite
	@$(MAKE) --no-print-directory --jobs 3 check suite ib-async-suite

suite: $(ALL)
	@# Once: each worker would rewrite all assertions for itself.
	@$(BIN)/python -m pytest -q --collect-only >/dev/null 2>&1 || :
	$(BIN)/python -m pytest -q -n $(WORKERS) $(AT_ONCE)

ib-async-suite: $(IB_ASYNC)/.installed
	@mkdir -p build
	$(IB_ASYNC)/bin/python -m pytest -q -n 2 $(AT_ONCE) $(IB_TESTS) > build/ib-async.log 2>&1; \
		code=$$?; echo "with ib_async:"; cat build/ib-async.log; exit $$code

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
	rm -rf $(VENV) $(IB_ASYNC) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "httptrading needs Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The core's own dependencies, to be installed in the tested versions, and no SDK.
$(CORE_ONLY): pyproject.toml | $(BIN)/python
	@$(BIN)/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > $@

$(CORE): $(CORE_ONLY) requirements.txt
	$(BIN)/python $(PIP) -c requirements.txt -r $(CORE_ONLY)
	@-$(BIN)/python $(COMPILE) $(VENV)/lib
	@touch $@

$(ALL): requirements.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/python $(PIP) -r requirements-dev.txt
	@-$(BIN)/python $(COMPILE) $(VENV)/lib
	@touch $@ $(CORE)

# tzdata: ib_async pins another version than the one tested with the rest.
$(IB_ASYNC)/.installed: $(CORE_ONLY) requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(IB_ASYNC)
	@grep -hvE '^(-r|tzdata==)' requirements.txt requirements-dev.txt > $(IB_ASYNC)/constraints.txt
	$(IB_ASYNC)/bin/python $(PIP) -c $(IB_ASYNC)/constraints.txt -r $(CORE_ONLY) \
		pytest pytest-xdist hypothesis psutil ib-async==2.1.0
	@-$(IB_ASYNC)/bin/python $(COMPILE) $(IB_ASYNC)/lib
	@touch $@
