# Everything a person does with this repository; `make` lists it. Settings: .env.example.
.DEFAULT_GOAL := help
.PHONY: help up down status env browser test test-all test-hostile test-load test-compose lint format lock clean
PY := .venv/bin/python
COMPILE := .venv/bin/uv pip compile --quiet --universal --python-version 3.11
IMAGES := prediction torchserve promoter training mlflow page

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: env ## start everything and open the doors: page, MLflow, TorchServe, promoter (Ctrl-C stops)
	@$(PY) scripts/stack.py up

down: ## stop everything that `make up` started, from another terminal or after an accident
	@if [ -x $(PY) ]; then $(PY) scripts/stack.py down; else echo "Nothing to stop: there is no environment yet."; fi

status: env ## show what is running, and where
	@$(PY) scripts/stack.py status

env: ## make or repair .venv (part of every command that needs it)
	@scripts/setup_env.sh

browser: # Chromium, which needs root and is asked for before anything takes long, and the environment
	@scripts/setup_env.sh --browser
	@scripts/setup_env.sh

test: browser ## run the tests: unit tests first, then the live stack and the page in Chromium
	@$(PY) -m pytest -m "not slow and not containers and not hostile and not load"

test-all: browser ## run all tests but those in containers: also a fresh clone set up from nothing, hostile requests, load
	@$(PY) -m pytest -m "not containers"

test-hostile: env ## send 5,000 malformed or odd requests to the live server, and print how it bore them
	@$(PY) -m pytest tests/test_hostile.py tests/test_privacy.py -s

test-load: env ## kill workers, swap versions, overload and soak the live server, and print how it bore it
	@$(PY) -m pytest tests/test_load.py -s

test-compose: browser ## build the images and run the stack in containers, with the Docker Engine of $DOCKER_HOST
	@$(PY) -m pytest -m containers -x -s

lint: env ## check style, formatting and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: env ## put imports and layout in order
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

lock: env ## pin what pyproject.toml asks for into requirements/ (make lock upgrade=--upgrade: newest versions)
	@$(COMPILE) $(upgrade) --group all -o requirements/all.txt
	@for group in $(IMAGES); do \
	  $(COMPILE) --group $$group -c requirements/all.txt -o requirements/$$group.txt || exit 1; done

clean: down ## remove environment and caches; runs and models (.stack, model_store) stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
