# make install | lint | test | fuzz | chaos | demo | docs | check-env | accel | build-ops | lock | clean | help
#
#   PYTHON=python3.13   which Python (default: the one of VENV, else the newest tested that runs)
#   VENV=.venv          where the environment goes
#   UV=1                install with uv in place of pip
#   CPU=1               PyTorch without CUDA (0.2 instead of 3 GB), from download.pytorch.org
#   MMCV_OPS=1          compile mmcv's ops for the torch present, and use them
#   STACK=current       pins: torch2.14, torch2.11, py38-torch2.0.0, py38-torch1.10.2; current: the newest that fits

VENV ?= .venv
STACK ?= current
MMCV_OPS ?= 0
UV ?= 0
CPU ?= 0

BIN := $(VENV)/bin/python
OLD := $(filter py38-%,$(STACK))
NAMES := $(strip $(if $(OLD),,python3.14 python3.13 python3.12 python3.11 python3.10 python3) python3.8)
SUITS := import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in \
         [(3, 8)$(if $(OLD),,, (3, 10), (3, 11), (3, 12), (3, 13), (3, 14))])
PYTHON ?= $(shell for p in $(BIN) $(NAMES); do $$p -c '$(SUITS)' >/dev/null 2>&1 && echo $$p && break; done)

flag = $(if $(filter 1,$($(1))),--$(2))
INSTALL := tools/install.py --venv $(VENV) --stack $(STACK) $(call flag,UV,uv)
DOCS := $(VENV)-docs
LINT := $(VENV)-lint
STAMP := $(VENV)/.installed-$(STACK)$(if $(filter 1,$(CPU)),-cpu)$(if $(filter 1,$(MMCV_OPS)),-mmcv-ops)

.PHONY: help install lint test fuzz chaos demo docs check-env accel build-ops lock clean

help:
	@sed -n 's/^# \?//p' Makefile | head -8

install: $(STAMP)

$(STAMP): $(filter-out %/accel.txt,$(wildcard requirements/*/*.txt))
	@test -n "$(PYTHON)" || { echo "error: none of $(NAMES) runs here with its venv module;" \
	  "on Debian and Ubuntu: apt install python3 python3-venv (Python 3.10 to 3.14);" \
	  "or name one: make PYTHON=/path/to/python3.13" >&2; exit 1; }
	@$(PYTHON) $(strip $(INSTALL) $(call flag,CPU,cpu) $(call flag,MMCV_OPS,mmcv-ops))
	@touch $@

# In an environment of its own, of ruff and mypy alone: seconds.
lint: $(LINT)/.installed
	$(LINT)/bin/ruff check --quiet .
	$(LINT)/bin/ruff format --quiet --check .
	$(LINT)/bin/mypy --no-error-summary

$(LINT)/.installed: requirements/lint.txt
	$(PYTHON) -m venv --clear $(LINT)
	$(LINT)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/lint.txt
	@touch $@

test: $(STAMP)
	$(BIN) -m pytest

# Twelve thousand damaged files of all kinds, in some ten minutes: each is read right or refused in a sentence.
fuzz: $(STAMP)
	SPARSEOCC_FUZZ_CASES=1500 $(BIN) -m pytest tests/fuzz

# A training of two processes, killed twenty times at random moments, must end as one that never was: some minutes.
chaos: $(STAMP)
	SPARSEOCC_KILLS=20 $(BIN) -m pytest tests/run/test_chaos.py

demo: $(STAMP)
	$(BIN) tools/demo.py

# The site, into outputs/site; a warning is an error. In an environment of its own, of a few small packages.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	@echo "docs: outputs/site/index.html"

$(DOCS)/.installed: requirements/docs.txt requirements/docs-lock.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt -c requirements/docs-lock.txt
	@touch $@

check-env:
	@if test -x $(BIN); then $(BIN) tools/check_env.py; else $(PYTHON) tools/check_env.py; fi

# Pillow-SIMD in Pillow's place, and TurboJPEG's wrapper.
accel: $(STAMP)
	@$(BIN) $(strip $(INSTALL)) --accel

# The CUDA extensions, in place. Needs nvcc of the CUDA version that torch was built with.
build-ops: $(STAMP)
	$(BIN) setup.py build_ext --inplace

# The versions of everything that the pinned packages bring along, for each stack. Needs uv and the package index.
LOCK := uv pip compile -q --no-annotate --custom-compile-command "make lock" --python-version
pins = $(addprefix requirements/$(1)/,build.txt $(2) base.txt test.txt) -o requirements/$(1)/$(3)
lock:
	$(LOCK) 3.11 --universal $(call pins,torch2.14,torch.txt,lock.txt)
	$(LOCK) 3.10.2 --universal $(call pins,torch2.11,torch.txt,lock.txt)
	$(LOCK) 3.8.1 $(call pins,py38,torch-2.0.0.txt,lock-2.0.0.txt)
	$(LOCK) 3.8.1 $(call pins,py38,torch-1.10.2.txt,lock-1.10.2.txt)
	$(LOCK) 3.10.2 --universal requirements/docs.txt -o requirements/docs-lock.txt

clean:
	rm -rf build *.egg-info .pytest_cache .hypothesis .nox
	find configs lib loaders models tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	find lib models -name '*.so' -delete
