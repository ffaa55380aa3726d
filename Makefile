# make install | test | demo | check-env | accel | build-ops | clean | help
#
#   PYTHON=python3.12   which Python (default: the first of 3.11, 3.12, 3.10 that runs)
#   VENV=.venv          where the environment goes
#   MMCV_OPS=1          compile mmcv's ops for the torch present, and use them
#   STACK=current       pins: current, py38-torch2.0.0 or py38-torch1.10.2 (these two want PYTHON=python3.8)

VENV ?= .venv
STACK ?= current
MMCV_OPS ?= 0

NAMES := $(if $(filter py38-%,$(STACK)),python3.8,python3.11 python3.12 python3.10 python3)
SUITS := import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in \
         $(if $(filter py38-%,$(STACK)),[(3, 8)],[(3, 10), (3, 11), (3, 12)]))
PYTHON ?= $(shell for p in $(NAMES); do $$p -c '$(SUITS)' >/dev/null 2>&1 && echo $$p && break; done)

BIN := $(VENV)/bin/python
REQUIREMENTS := requirements$(if $(filter py38-%,$(STACK)),/py38)
PINS := $(filter-out %/accel.txt,$(wildcard $(REQUIREMENTS)/*.txt))
STAMP := $(VENV)/.installed-$(STACK)$(if $(filter 1,$(MMCV_OPS)),-mmcv-ops)

.PHONY: help install test demo check-env accel build-ops clean

help:
	@sed -n 's/^# \?//p' Makefile | head -6

install: $(STAMP)

$(STAMP): $(PINS)
	@test -n "$(PYTHON)" || { echo "error: none of $(NAMES) runs here with its venv module;" \
	  "on Debian and Ubuntu: apt install python3.11 python3.11-venv;" \
	  "or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) tools/install.py --venv $(VENV) --stack $(STACK) $(if $(filter 1,$(MMCV_OPS)),--mmcv-ops)
	@touch $@

test: $(STAMP)
	$(BIN) -m pytest

demo: $(STAMP)
	$(BIN) tools/demo.py

check-env:
	@if test -x $(BIN); then $(BIN) tools/check_env.py; else $(PYTHON) tools/check_env.py; fi

# Pillow-SIMD in Pillow's place, and TurboJPEG's wrapper.
accel: $(STAMP)
	$(BIN) -m pip uninstall -q -y pillow
	$(BIN) -m pip install -q -r $(REQUIREMENTS)/accel.txt

# The CUDA extensions, in place. Needs nvcc of the CUDA version that torch was built with.
build-ops: $(STAMP)
	$(BIN) setup.py build_ext --inplace

clean:
	rm -rf build *.egg-info .pytest_cache .hypothesis .nox
	find configs lib loaders models tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	find lib models -name '*.so' -delete
