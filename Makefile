# `make demo` sets everything up and runs the main job; `make test` checks everything.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup test fix demo bench docs evidence evidence-docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,explain]'
	touch $(STAMP)

# A test computes with one thread; workers start with torch, so more than cores is no gain.
JOBS ?= 2
test: setup
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check --no-cache .
	$(BIN)/mypy
	$(BIN)/python docs/build.py --check
	$(BIN)/python experiments/evidence.py --check
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup
	$(BIN)/python examples/demo/demo.py

bench: setup demo-output/gates
	mkdir -p build
	$(BIN)/python benchmarks/run.py --gates demo-output/gates \
	  --data examples/demo/data/heldout.jsonl --keep 0.75 0.5 0.3 --new-tokens 32 \
	  --json build/bench_smollm2_135m.json

demo-output/gates:
	$(MAKE) demo

docs: setup
	$(BIN)/python docs/build.py

# `make evidence HOURS=2 DATA=folder` makes what is missing; DATA holds the public sets that
# experiments/smollm2/texts.py names, and in eval/ the questions of experiments/smollm2/tasks.
# Without it real text is left out.
HOURS ?= 2
DATA ?=
evidence: setup
	test -d experiments/lab/dense_1m_s0 || $(BIN)/python experiments/lab/model.py experiments/lab/dense_1m_s0
	test -d experiments/lab/dense_03m_s0 || \
	  $(BIN)/python experiments/lab/model.py experiments/lab/dense_03m_s0 --size 03m
	$(BIN)/python experiments/lab/run.py experiments/results/lab --budget-hours $(HOURS) \
	  --models build/lab/models
	$(BIN)/python experiments/lab/timing.py experiments/results/lab build/lab/models
ifneq ($(DATA),)
	$(BIN)/python examples/demo/model.py --unpack
	$(BIN)/python experiments/smollm2/texts.py $(DATA) build/smollm2/texts
	$(BIN)/python experiments/smollm2/trained.py build/demo/SmolLM2-135M-Instruct \
	  build/smollm2/texts $(DATA)/eval experiments/results/smollm2 --budget-hours $(HOURS) \
	  --models build/smollm2/models
	$(BIN)/python experiments/smollm2/timing.py experiments/results/smollm2 \
	  build/smollm2/models build/demo/SmolLM2-135M-Instruct
	$(BIN)/python experiments/smollm2/untrained.py build/demo/SmolLM2-135M-Instruct \
	  experiments/results/smollm2
endif
	$(BIN)/python experiments/evidence.py

evidence-docs: setup
	$(BIN)/python experiments/evidence.py

clean:
	rm -rf build dist demo-output .mypy_cache .pytest_cache .ruff_cache
