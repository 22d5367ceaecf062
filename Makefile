# These commands do everything: `make demo`, `make demo-llm` and `make test`. They create .venv on first use, from pinned
# versions.
#
#   PYTHON       interpreter that .venv is made with (3.11 or newer for constraints.txt)
#   CONSTRAINTS  constraints.txt (newest tested versions) or constraints-lowest.txt (oldest)
#   THREADS      OpenMP threads per test process
#   WORKERS      test processes
#   PYTEST_FLAGS more flags of pytest

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
THREADS ?= 1
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(basename $(notdir $(CONSTRAINTS)))
SOURCES := $(wildcard src tests examples benchmarks)

.PHONY: test-robustness help venv demo demo-llm test test-lowest test-newest test-ends test-slow coverage quality style clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train, evaluate and use an early-exit classifier on real data"
	@echo "make demo-llm  the same for a language model: exits for SmolLM2, text at three speeds"
	@echo "make test      run the tests"
	@echo "make coverage  run the tests with branch coverage, of which there must be 90 %"
	@echo "make test-slow run the tests marked slow"
	@echo "make test-ends run the tests with the oldest promised and the newest published releases (before a release)"
	@echo "make test-robustness  hostile files and arguments, and training runs that are killed"
	@echo "make quality   lint, format check, types"
	@echo "make style     apply lint fixes and format"

venv: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev,plots,demo,generation,openvino,onnxruntime,ray]'
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo_assets.py --output runs/assets
	$(BIN)/python examples/run_glue_cee.py examples/configs/demo.yaml
	$(BIN)/python examples/classify_demo.py --model runs/demo </dev/null
	$(BIN)/python examples/engines_demo.py --model runs/demo --data runs/assets/trec --output runs/demo-engines

demo-llm: $(STAMP)
	$(BIN)/python examples/demo_llm_assets.py --output runs/assets-llm
	$(BIN)/python examples/run_clm_cee.py examples/configs/demo_llm.yaml
	$(BIN)/python examples/generate_demo.py --model runs/demo-llm

test: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS)

# Counting branches takes half as long again.
coverage:
	$(MAKE) test PYTEST_FLAGS="--cov --cov-report=term --cov-fail-under=90"

test-ends: test-lowest test-newest

test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

# What pip takes today without our constraints, but for torch, whose newest wheel may bring gigabytes of GPU libraries.
# Deprecations that a release after the pinned one has brought are listed, not raised.
test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	grep '^torch==' constraints.txt >.venv-newest/torch.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -c .venv-newest/torch.txt -e '.[dev,plots,demo,generation,openvino,onnxruntime,ray]'
	$(MAKE) test VENV=.venv-newest STAMP= PYTEST_FLAGS='-W default::FutureWarning'

test-slow: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -m slow

test-robustness: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/robustness/fuzz.py --inputs 1000
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/robustness/kills.py --kills 100

quality: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
