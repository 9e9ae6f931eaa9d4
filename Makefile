# SigLIP Serve. `make` alone prints what there is.

PYTHON ?= python3
VENV ?= .venv
CHECKPOINT ?= checkpoints/siglip-tiny
TEAMS_CHECKPOINT ?= checkpoints/siglip-tiny-jersey
DEVICE ?= auto
HOST ?= 127.0.0.1
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
SAMPLE ?= checkpoints/siglip-tiny/samples/dog.jpg
URL ?= 127.0.0.1:$(GRPC_PORT)
DATA ?= data/drawings
OUTPUT ?= validation
ARGS ?=

APT := -o Dir::State::Lists=$(CURDIR)/.tools/lists -o Dir::Cache=$(CURDIR)/.tools/archives -o Debug::NoLocking=1

BIN := $(VENV)/bin
# pip shows its progress on a terminal and is silent in a log; standard output is a pipe here.
PIP = $(BIN)/pip install --disable-pip-version-check $$(test -t 2 || echo --quiet)
SERVER := $(VENV)/.server
DEV := $(VENV)/.dev
GATEWAY_CLIENTS := $(VENV)/.gateway-clients
BULK_READERS := $(VENV)/.bulk-readers
# Two processes; tests that share a server stay in one of them. ARGS="-n 0" runs all in one process.
PARALLEL := -n 2

.DEFAULT_GOAL := help
.PHONY: help install serve test test-unit test-gateway test-bulk lint validate bench load mutants chaos tools format clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables of serve: CHECKPOINT (SigLIP or CLIP: a directory, or a hub id such as"
	@echo "google/siglip-so400m-patch14-384 or openai/clip-vit-large-patch14, owner/name@revision), TEAMS_CHECKPOINT"
	@echo "(that of the football teams, named alike), DEVICE (auto, cpu, cuda), HOST, HTTP_PORT, GRPC_PORT,"
	@echo "METRICS_PORT, and ARGS for any further option of siglip-serve serve. PYTHON chooses the interpreter (3.11 or 3.12)."
	@echo "Variables of validate: URL (host:port of gRPC), DATA (an ImageNet-shaped folder), CHECKPOINT,"
	@echo "OUTPUT (a folder for both reports), and ARGS for further options of validate.siglip_vision."
	@echo "Variables of load: URL, and ARGS for options of siglip-serve bench."

install: $(SERVER) ## A virtual environment in .venv with all that serving needs

serve: $(SERVER) ## Run the server on 127.0.0.1, HTTP 8000, gRPC 8001, metrics 8002, gateway 8080; Ctrl-C stops it
	@exec $(BIN)/siglip-serve serve --checkpoint $(CHECKPOINT) --device $(DEVICE) --host $(HOST) \
	  --teams-checkpoint $(TEAMS_CHECKPOINT) \
	  --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT) \
	  --sample-image "$(SAMPLE)" $(ARGS)

test: $(DEV) ## All tests: the library alone, against transformers, against real servers
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-unit: $(DEV) ## The tests that need no server
	$(BIN)/python -m pytest $(PARALLEL) tests/unit $(ARGS)

test-gateway: $(GATEWAY_CLIENTS) ## The clients of OpenAI, Cohere, LangChain, LlamaIndex, LiteLLM, Weaviate, Immich before the gateway
	$(BIN)/python -m pytest -n 0 -rs tests/unit/gateway tests/triton/gateway $(ARGS)

test-bulk: $(BULK_READERS) ## Outputs of siglip-serve bulk opened by pandas, polars, datasets, DuckDB and LanceDB
	$(BIN)/python -m pytest -n 0 -rs tests/unit/bulk tests/bulk $(ARGS)

lint: $(DEV) ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for model in model_repository/*/1/model.py; do $(BIN)/mypy $$model || exit 1; done

validate: $(DEV) $(filter data/drawings/%,$(DATA)/LOC_synset_mapping.txt) ## Accuracy and parity of a running server; DATA=/imagenet for the real thing
	$(BIN)/python -m validate.siglip_vision --url $(URL) --data $(DATA) --output $(OUTPUT) --shots 1 5 10 --baselines \
	  $(if $(wildcard $(DATA)/never_trained.txt),--styles --class-list $(DATA)/never_trained.txt) $(ARGS)
	$(BIN)/python -m validate.parity --url $(URL) --data $(DATA) --output $(OUTPUT) --checkpoint $(CHECKPOINT) --valid-per-class 4

bench: $(DEV) ## Speed on this machine's CPU, small; figures and plots go to build/bench
	$(PIP) -e '.[bench]'
	rm -rf build/bench
	$(BIN)/python -m benchmarks.preprocess --seconds 2 --output build/bench/preprocess.csv
	$(BIN)/python -m benchmarks.vision_tower --rows 4 --seconds 10 --output build/bench/vision_tower.csv
	$(BIN)/python -m benchmarks.serve_load --checkpoint checkpoints/siglip-tiny --concurrency 1 4 8 --processes 1 \
	  --seconds 5 --warmup 1 --output build/bench/serve_load.csv
	$(BIN)/python -m benchmarks.peers --checkpoint checkpoints/siglip-tiny --device cpu --inputs 500x375 text --concurrency 8 \
	  --seconds 8 --warmup 2 --output build/bench/peers.csv
	$(BIN)/python -m benchmarks.plots --results build/bench
	@echo "Figures are in $(CURDIR)/build/bench. On a busy or shared machine only the ratios mean something."

load: $(SERVER) ## Load on a running server; a table and a curve go to build/load
	$(PIP) -e '.[load]'
	$(BIN)/siglip-serve bench --url $(URL) $(ARGS)

mutants: $(DEV) ## Plant known faults in a copy of the code and say which tests notice them; ARGS chooses
	$(BIN)/python tests/mutants.py $(ARGS)

chaos: $(SERVER) ## Attack a server of its own for hours, and print a table; ARGS chooses, as in ARGS="--only fuzz --cases 3000"
	$(BIN)/python -m tests.chaos $(ARGS)

tools: ## nginx and Prometheus for the tests of docker/, Chromium for those of the page, from Debian into .tools, without root
	mkdir -p .tools/lists/partial .tools/archives/partial
	cd .tools && apt-get -qq $(APT) update && apt-get -qq $(APT) download nginx prometheus
	# Chromium, and those of its libraries that this machine does not have. Nothing is installed.
	-cd .tools && apt-get -qq $(APT) download $$(apt-get $(APT) --simulate --no-install-recommends \
	  install chromium-headless-shell | awk '/^Inst/ { print $$2 }')
	for package in .tools/*.deb; do dpkg-deb -x $$package .tools; done
	rm -rf .tools/lists .tools/archives .tools/*.deb
	.tools/usr/sbin/nginx -v && .tools/usr/bin/prometheus --version > .tools/version || { rm -rf .tools; exit 1; }

format: $(DEV) ## Put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the virtual environment and all caches
	rm -rf $(VENV) .tools .mypy_cache .pytest_cache .ruff_cache .validation-cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The offline benchmark: drawings in ImageNet's layout. Fetching them needs npm and, for two fonts, apt-get.
data/drawings/LOC_synset_mapping.txt:
	$(PIP) -e '.[training]'
	$(BIN)/python -m training.build_benchmark --out data/drawings

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "SigLIP Serve needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "The code uses features of 3.11. Triton's Python backend needs numpy 1.26, which has no wheel for 3.13." >&2; \
	  echo "Name another interpreter: make PYTHON=python3.12 $(or $(MAKECMDGOALS),install)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(SERVER): pyproject.toml $(VENV)/bin/python
	@echo "Installing the server into $(VENV): 1.9 GB with torch for CPUs, more with CUDA, some minutes ..."
	@$(PIP) -e '.[server]'
	@touch $@

$(DEV): $(SERVER)
	@echo "Installing the tools of tests and validation into $(VENV): 1.6 GB more, some minutes ..."
	@$(PIP) -e '.[server,validate,dev]'
	@touch $@

# All at once, so that the clients cannot move the pins of the server.
$(GATEWAY_CLIENTS): $(DEV)
	@echo "Installing LangChain, LlamaIndex and LiteLLM into $(VENV): 370 MB more ..."
	@$(PIP) -e '.[server,validate,dev,gateway-clients]'
	$(BIN)/pip check
	@touch $@

$(BULK_READERS): $(DEV)
	@echo "Installing pandas, polars, datasets, DuckDB and LanceDB into $(VENV): 520 MB more ..."
	@$(PIP) -e '.[server,validate,dev,bulk-readers]'
	$(BIN)/pip check
	@touch $@
