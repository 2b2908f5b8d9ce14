# Two commands do all the set-up: `make quickstart` and `make test`. TORCH_INDEX=URL chooses torch's build (a CPU or CUDA index).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread a worker: torch's own threads and the workers would fight over the cores.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install quickstart test check fix parity strict chaos faults mutations bench gpu oracle collectives trace memory engine-fairscale engine-colossalai engines switch docs clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --index-url $(TORCH_INDEX) 'torch>=2.11$(comma)<2.14')
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/python -m compileall -q clusters orchestrator strategies
	touch $@
comma := ,

install: $(INSTALLED)

quickstart: $(INSTALLED)  ## a small OPT learns real text on this machine: plan, Ray, two workers, checkpoint, report
	$(BIN)/python examples/make_corpus.py examples/corpus/stdlib.jsonl
	$(BIN)/shardwise prepare examples/quickstart.yaml
	$(BIN)/shardwise plan examples/quickstart.yaml
	$(BIN)/shardwise run examples/quickstart.yaml
	$(BIN)/shardwise generate runs/quickstart --prompt 'def ' --max-tokens 200

test: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not slow'

check: $(INSTALLED)  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

parity: $(INSTALLED)  ## every strategy against one process, as a table
	$(BIN)/python -m benchmarks.parity

strict: $(INSTALLED)  ## every pipeline order, and a slice of parity on process groups, under the rules of NCCL
	$(BIN)/python -m pytest -q -m slow tests/unit/test_pipeline_messages.py
	$(BIN)/python -m benchmarks.strict

chaos: $(INSTALLED)  ## kill -9 at 20 random moments: always resumes, same losses bit for bit
	$(BIN)/python -m benchmarks.chaos

faults: $(INSTALLED)  ## signals, dead terminals, stopped and stuck processes, jumping clocks, as a table
	$(BIN)/python -m benchmarks.faults

mutations: $(INSTALLED)  ## 1,000 altered checkpoints and 1,000 altered tokenizer folders: nothing is run, all are answered
	$(BIN)/python -m benchmarks.mutations

bench: $(INSTALLED)  ## speed against Hugging Face, overhead, start-up, prediction against measurement
	$(BIN)/python -m benchmarks.bench

oracle: $(INSTALLED)  ## the planner against published measurements, cross-validated
	$(BIN)/python -m benchmarks.oracle

collectives: $(INSTALLED)  ## messages priced against messages sent, on every rank, as a table
	$(BIN)/python -m benchmarks.collectives

trace: $(INSTALLED)  ## closed form against the traced step, as a table
	$(BIN)/python -m benchmarks.trace

memory: $(INSTALLED)  ## bytes planned, traced and allocated by a run on CPU processes, as a table
	$(BIN)/python -m benchmarks.memory

gpu:  ## native ZeRO, recompute and offload on the GPUs present, one JSON; needs torch, numpy, PyYAML and pydantic alone
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu

engine-fairscale: $(INSTALLED)  ## fairscale in a folder of its own, which only its workers see
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/engines/fairscale fairscale==0.4.13

# Its metadata asks for torch 2.5: --no-deps, with what it imports by name, and not torch.
engine-colossalai: $(INSTALLED)  ## ColossalAI in a folder of its own, which only its workers see
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/engines/colossalai colossalai==0.5.0 transformers==4.51.3 \
	  'tokenizers==0.21.*' 'huggingface_hub<1' peft==0.13.2 'accelerate<2' 'einops==0.8.*' galore-torch==1.0 bitsandbytes \
	  filelock regex tqdm requests packaging

engines: $(INSTALLED)  ## ColossalAI and fairscale against the native engine, as a table
	$(BIN)/python -m benchmarks.engines

switch: $(INSTALLED)  ## checkpoints between engines and strategies, as a table
	$(BIN)/python -m benchmarks.switch

docs: $(INSTALLED)  ## every command of the pages under docs/, those that train too, and the exported Slurm script
	$(BIN)/python -m pytest tests/golden/test_docs.py tests/ray/test_export_run.py

clean:
	rm -rf $(VENV) runs examples/corpus
