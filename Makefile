# The commands of this repository; `make` lists them. Settings: .env.example.
.DEFAULT_GOAL := help
.PHONY: help up down status env archive browser test unit-tests live-tests test-all test-hostile test-load test-compose lint format lock clean
PY := .venv/bin/python
COMPILE := .venv/bin/uv pip compile --quiet --universal --python-version 3.11
# Texts are UTF-8, whatever the locale.
export PYTHONUTF8 := 1
IMAGES := prediction torchserve promoter training mlflow monitor page
# Unit tests run in parallel, one file at a time in each process; the live ones share one stack and run one after the other.
PARALLEL := OMP_NUM_THREADS=1 nice $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile
LONG := not slow and not containers and not hostile and not load
UNIT_LOG := .pytest_cache/unit-tests.log

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: env ## start page, MLflow, TorchServe, promoter and monitor; Ctrl-C stops them
	@$(PY) scripts/stack.py up

down: ## stop what `make up` started, from another terminal
	@if [ -x $(PY) ]; then $(PY) scripts/stack.py down; else echo "Nothing to stop: there is no environment yet."; fi

status: env ## show what is running, and its address
	@$(PY) scripts/stack.py status

env: ## make or repair .venv; other commands do this themselves
	@scripts/setup_env.sh

archive: env ## install Ray for scripts/score.py, which scores archives
	@scripts/setup_env.sh --archive

browser: # Chromium first, because only root can install it
	@scripts/setup_env.sh --browser
	@scripts/setup_env.sh

test: browser ## run the unit tests and, at the same time, the tests of the live stack
	@$(MAKE) --no-print-directory --jobs=2 --keep-going unit-tests live-tests

unit-tests: env # they take the time in which the live ones wait; their output comes in one piece
	@mkdir -p $(dir $(UNIT_LOG)) && { $(PARALLEL) -m "not live and $(LONG)" > $(UNIT_LOG) 2>&1; code=$$?; cat $(UNIT_LOG); exit $$code; }

live-tests: env
	@$(PY) -m pytest -m "live and $(LONG)"

test-all: browser archive ## run all tests without containers: also a fresh clone, hostile requests and load
	@$(PARALLEL) -m "not live and not containers"
	@$(PY) -m pytest -m "live and not containers"

test-hostile: env ## send 5,000 malformed requests to the live server, and print its answers
	@$(PY) -m pytest tests/test_hostile.py tests/test_privacy.py -s

test-load: env ## kill workers, swap versions and overload the live server, and print the results
	@$(PY) -m pytest tests/test_load.py -s

test-compose: browser ## build the images and test the containers, with the Docker Engine of $DOCKER_HOST
	@$(PY) -m pytest -m containers -x -s

lint: env ## check style, formatting and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: env ## sort imports and format the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

lock: env ## pin the dependencies of pyproject.toml in requirements/ (make lock upgrade=--upgrade: newest versions)
	@$(COMPILE) $(upgrade) --group all -o requirements/all.txt
	@for group in $(IMAGES) archive; do \
	  $(COMPILE) --group $$group -c requirements/all.txt -o requirements/$$group.txt || exit 1; done

clean: down ## remove the environment and caches; runs and models (.stack, model_store) stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
