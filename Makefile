# The verbs. A person and CI run the same ones; each does all of its own set-up, so that
# `make demo` and `make test` work in a fresh clone. Needed beforehand: Python 3.11 or newer with
# venv, a C++ compiler, make; for `make js` also node and npm.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
PEER_READY := .venv-peer/.ready
CLIENT_READY := .venv-client/.ready
JS := tests/api/js
JS_READY := $(JS)/node_modules/.ready
SOURCES := src services tests bench examples
# On a machine with few cores the workers of native libraries only disturb each other.
export OPENBLAS_NUM_THREADS := 1
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export ANONYMIZED_TELEMETRY := False

# hnswlib is compiled on installing it, for this processor. Told that the terms of its sums may be
# taken in any order, GCC makes its distances faster (docs/decisions/0053-*.md); NaN stays NaN.
HNSWLIB_FLAGS := -fassociative-math -fno-signed-zeros -fno-trapping-math -funroll-loops \
  -fvariable-expansion-in-unroller --param max-variable-expansions-in-unroller=4 \
  --param max-unroll-times=4
# Another compiler may not know them.
hnswlib_flags = $(shell echo 'int i;' | $(CXX) -Werror $(HNSWLIB_FLAGS) -x c++ -c - -o /dev/null \
  2>/dev/null && echo '$(HNSWLIB_FLAGS)')

SEEDS ?= 300

.DEFAULT_GOAL := help
.PHONY: help setup fmt lint type imports test planned unit states states-long sim sim-long crash
.PHONY: crash-long storm-long conformance official js filters-long odd-long
.PHONY: bench bench-quick bench-report demo lock clean
.PHONY: damage damage-long
.DELETE_ON_ERROR:
# One size of `make bench` alone.
BENCH_SIZES := bench-20k-128 bench-20k-768 bench-100k-128 bench-many
.PHONY: $(BENCH_SIZES)

# Says what is missing before pip says it at length.
define check_machine
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.11 or newer," \
	  "or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is" \
	  "older than 3.11; name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module" \
	  "(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
endef
define check_compiler
	@command -v $(CXX) >/dev/null || { echo "no C++ compiler: hnswlib is compiled from source" \
	  "(Debian, Ubuntu: apt-get install g++)" >&2; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not (pathlib.Path( \
	  sysconfig.get_path("include")) / "Python.h").exists())' || { echo "$(PYTHON) has no C" \
	  "headers (Debian, Ubuntu: apt-get install python3-dev)" >&2; exit 1; }
endef

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with everything of requirements.lock and this project, editable.

$(READY): requirements.lock pyproject.toml
	$(check_machine)
	$(check_compiler)
	@echo "setup: installing into $(VENV); hnswlib is compiled here, half a minute"
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@CFLAGS="$(hnswlib_flags) $(CFLAGS)" CXXFLAGS="$(hnswlib_flags) $(CXXFLAGS)" \
	  $(RUN)/python -m pip install -qq --require-hashes -r requirements.lock
	@$(RUN)/python -m pip install -qq --no-deps --editable .
	@touch $@

$(PEER_READY): tests/conformance/requirements.txt
	$(check_machine)
	@echo "setup: the official server and its tests into .venv-peer"
	@test -x .venv-peer/bin/python || $(PYTHON) -m venv .venv-peer
	@.venv-peer/bin/python -m pip install -qq -r $<
	@touch $@

$(CLIENT_READY): tests/api/official/requirements.txt
	$(check_machine)
	@echo "setup: the official Python client into .venv-client"
	@test -x .venv-client/bin/python || $(PYTHON) -m venv .venv-client
	@.venv-client/bin/python -m pip install -qq -r $<
	@touch $@

$(JS_READY): $(JS)/package.json $(JS)/package-lock.json
	@command -v npm >/dev/null || { echo "make js needs node 20 or newer and npm" >&2; exit 1; }
	@echo "setup: the official JavaScript client into $(JS)/node_modules"
	@cd $(JS) && npm ci --omit=optional --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

fmt: $(READY) ## Format, and mend what can be mended.
	$(RUN)/ruff check --fix --quiet $(wildcard $(SOURCES))
	$(RUN)/ruff format $(wildcard $(SOURCES))

lint: $(READY) ## ruff: rules and format.
	$(RUN)/ruff check $(wildcard $(SOURCES))
	$(RUN)/ruff format --check $(wildcard $(SOURCES))

type: $(READY) ## mypy --strict.
	$(RUN)/mypy

imports: $(READY) ## The layers: roles stand on the library, never on each other.
	$(RUN)/lint-imports

PROTOS := $(sort $(wildcard protos/ochredb/proto/v1/*.proto))
PROTOC := $(RUN)/python -m grpc_tools.protoc -I protos
.PHONY: protos
protos: $(READY) ## Generate src/ochredb/proto anew from protos/; a test compares.
	$(PROTOC) --python_out=src --pyi_out=src $(PROTOS)
	$(PROTOC) --grpc_python_out=src $(filter-out %/common.proto,$(PROTOS))

LONGER := tests/crash tests/simulation tests/damage tests/distributed

unit: $(READY) ## Tests that need nothing else installed; the state machine in short.
	OCHREDB_STATE_STEPS=480 $(RUN)/python -m pytest -q -n auto tests $(LONGER:%=--ignore=%)

planned: $(READY) ## The longer tests can be collected, and find their fixtures; none is run.
	@$(RUN)/python -m pytest -q --setup-plan $(LONGER) >.planned.log 2>&1 \
	  || { grep -E '^(E  |ERROR|[0-9]+ )' .planned.log; exit 1; }
	@rm .planned.log; echo "planned: the longer tests find their fixtures"

test: lint type imports planned unit ## All of the above: must pass before a change is proposed.

states: $(READY) ## The state machine against a model: 2,400 steps, every answer compared.
	$(RUN)/python -m pytest -q -n auto tests/property/test_state_machine.py

sim: $(READY) ## The simulator: SEEDS clusters in simulated time, and every planted fault found.
	OCHREDB_SIMULATION_SEEDS=$(SEEDS) $(RUN)/python -m pytest -q -n auto tests/simulation

sim-long: $(READY) ## 10,000 simulated clusters, half an hour.
	OCHREDB_SIMULATION_SEEDS=10000 $(RUN)/python -m pytest -q -n auto \
	  tests/simulation/test_simulation.py -k test_seeds

states-long: $(READY) ## 100,000 steps of the state machine; a failure prints its seed.
	OCHREDB_STATE_STEPS=100000 $(RUN)/python -m pytest -q -n auto \
	  tests/property/test_state_machine.py

.PHONY: churn-long
churn-long: $(READY) ## 20,000 records overwritten 50 times, or deleted: disk comes back.
	OCHREDB_CHURN_LONG=1 $(RUN)/python -m pytest -q -s tests/api/test_churn.py

filters-long: $(READY) ## 20,000 generated filters against the reference evaluator, half an hour.
	OCHREDB_FILTERS=20000 $(RUN)/python -m pytest -q -s tests/property/test_filters.py

odd-long: $(READY) ## 3,000 rounds of odd bodies; 20,000 tails that move to a newer version.
	OCHREDB_ODD_ROUNDS=3000 OCHREDB_MOVED_EXAMPLES=20000 $(RUN)/python -m pytest -q --timeout 0 \
	  tests/unit/test_odd_bodies.py tests/unit/test_moved.py

crash: $(READY) ## kill -9 and power loss: at every crash point, and during writes, 100 rounds.
	$(RUN)/python -m pytest -q -n auto --maxschedchunk 1 tests/crash

crash-long: $(READY) ## The same, thousands of rounds, every hit of every crash point.
	OCHREDB_CRASH_ROUNDS=2000 OCHREDB_CRASH_HITS=all \
	  $(RUN)/python -m pytest -q -n auto --maxschedchunk 1 tests/crash --timeout 0

storm-long: $(READY) ## Eight processes on one directory, one killed every 200 ms; five minutes.
	OCHREDB_STORM_S=300 $(RUN)/python -m pytest -q -s tests/crash/test_storm.py

damage: $(READY) ## 300 random mutilations: an error or the right answer, and check finds them.
	OCHREDB_DAMAGE_CASES=300 $(RUN)/python -m pytest -q -s -n auto tests/damage

damage-long: $(READY) ## The same, 5,000 of them, half an hour and more.
	OCHREDB_DAMAGE_CASES=5000 $(RUN)/python -m pytest -q -s tests/damage

.PHONY: components cluster test-distributed partitions storm-cluster-long
.PHONY: differential-long
components: ## Install PostgreSQL, Ceph, Redis and nftables by apt-get, where they are missing.
	@tests/components/install.sh

cluster: $(READY) components ## A cluster of real processes on this machine, until ctrl-C.
	@$(RUN)/python -m tests.distributed.cluster

test-distributed: $(READY) $(PEER_READY) components ## Suites, storm and failures on a cluster.
	$(RUN)/python -m pytest -q --durations 10 tests/distributed
	@$(MAKE) --no-print-directory partitions

partitions: $(READY) components ## Hosts in namespaces, cut off from one another.
	tests/distributed/in_namespace.sh $(RUN)/python -m pytest -q \
	  tests/distributed/test_partitions.py

storm-cluster-long: $(READY) components ## Ten minutes of storm over a cluster.
	OCHREDB_STORM_S=600 $(RUN)/python -m pytest -q -s tests/distributed/test_storm.py

differential-long: $(READY) components ## 2,000 random operations, on a cluster and embedded.
	OCHREDB_DIFFERENTIAL_STEPS=2000 $(RUN)/python -m pytest -q -s \
	  tests/distributed/test_differential.py

conformance: $(READY) $(PEER_READY) ## The official client's own tests against our server, 5 min.
	$(RUN)/python tests/conformance/against_ochredb.py --python .venv-peer/bin/python

official: $(READY) $(CLIENT_READY) ## The official Python client against our server.
	OCHREDB_REQUIRE_CLIENTS=official $(RUN)/python -m pytest -q tests/api/test_official_clients.py \
	  -k python

js: $(READY) $(JS_READY) ## The official JavaScript client against our server.
	OCHREDB_REQUIRE_CLIENTS=js $(RUN)/python -m pytest -q tests/api/test_official_clients.py \
	  -k javascript

bench: $(READY) $(PEER_READY) ## Measure beside the official server, every size; half an hour.
	$(RUN)/python bench/run.py --full

bench-quick: $(READY) $(PEER_READY) ## The same with 5,000 records, a minute or two.
	$(RUN)/python bench/run.py --size quick

$(BENCH_SIZES): bench-%: $(READY) $(PEER_READY)
	$(RUN)/python bench/run.py --size $*

.PHONY: bench-cluster
bench-cluster: $(READY) components ## What the distributed form costs, on this machine; 5 min.
	$(RUN)/python bench/cluster.py

bench-report: $(READY) ## Tables, pictures and the README's figures anew from bench/results.
	$(RUN)/python bench/run.py --write-up-only

demo: $(READY) ## Store and search the standard library's docstrings; ends by itself.
	$(RUN)/python examples/stdlib_search.py

lock: ## Write requirements.lock anew from pyproject.toml (needs uv).
	uv pip compile pyproject.toml --extra cluster --extra dev --universal --python-version 3.11 \
	  --quiet --generate-hashes --custom-compile-command "make lock" --output-file requirements.lock

clean: ## Remove environments, caches and what was built.
	rm -rf .venv .venv-peer .venv-client $(JS)/node_modules build dist *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
