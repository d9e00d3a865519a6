# `make` lists the targets.
#
# A variable on the command line becomes the option of that name of the command that the target runs:
#   make student DATA=cifar10 ARCH=cnn LOSS='kd:temperature=4 hard:weight=0.1' BASELINE=0
# is softcache student --data cifar10 --arch cnn --loss kd:temperature=4 --loss hard:weight=0.1
#
#   VENV=     the virtual environment that is made and used; .venv by default
#   PYTHON=   the interpreter that makes it; python3 by default
#   PY=       an interpreter that has the packages already: nothing is installed

SHELL := bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
PY ?= $(VENV)/bin/python
OWN := PYTHON VENV PY

# Installed anew when pyproject.toml changes. With PY= nothing is.
INSTALLED := $(if $(filter file,$(origin PY)),$(VENV)/installed)
BENCH_INSTALLED := $(if $(filter file,$(origin PY)),$(VENV)/installed-bench)

# NAME='value' of every variable that was given on the command line, or of those of $(1).
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command%,$(origin $(name))),$(name)))
GIVEN := $(filter-out $(OWN) MAKEFLAGS MAKEOVERRIDES SHELL,$(GIVEN))
quoted = '$(subst ','\'',$(1)=$($(1)))'
variables = $(foreach name,$(or $(1),$(GIVEN)),$(if $(filter $(name),$(GIVEN)),$(call quoted,$(name))))
SOFTCACHE := $(PY) -m softcache.stages.make_variables

DATA ?= digits
CACHE ?= caches/$(notdir $(patsubst %/,%,$(patsubst folder:%,%,$(DATA))))
SEEDS_OF_DIGITS := $(if $(filter digits,$(DATA)),SEEDS=5)
ARCHS := $(if $(filter digits,$(DATA)),mlp:32 mlp:64 cnn,resnet8 cnn mlp:512)
# One cache that is not there yet is made, with the defaults of its data set.
# The student's options are checked first, so that a wrong name does not cost the training of a teacher. A run that is
# resumed has its own cache and options.
RESUMED := $(filter-out 0,$(RESUME))
typed = make $@ $(foreach name,$(OWN),$(if $(filter command%,$(origin $(name))),$(call quoted,$(name)))) $(variables)
make-cache = $(if $(RESUMED)$(word 2,$(CACHE)),,test -f '$(CACHE)/manifest.json' || { \
  $(SOFTCACHE) --check student $(variables) && $(SOFTCACHE) --typed $(typed) -- \
  teacher-cache OUT='$(CACHE)' $(call variables,DATA DATA_ROOT DEVICE WORKERS) $(if $(JSON),>&2); })

.PHONY: help install teacher teacher-cache student students lint test browser hosts slow torture bench gpu-check docs check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 16

install: $(INSTALLED) ## make .venv and install softcache, its extras and its tools

$(VENV)/installed: pyproject.toml
	@echo "installing into $(VENV) (PyTorch is large: a minute or more)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --upgrade pip
	@$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	@$(VENV)/bin/python -m pip install --quiet -e '.[dev,bench]'
	@touch $@

teacher: $(INSTALLED) ## train a teacher: DATA= ARCH= EPOCHS= OUT=
	@$(SOFTCACHE) teacher $(variables)

teacher-cache: $(INSTALLED) ## run a teacher once and write its outputs to a cache: DATA= TEACHER= WEIGHTS= VIEWS= DRAWS= TAPS=
	@$(SOFTCACHE) teacher-cache $(variables)

student: $(INSTALLED) ## train a student from the cache, which is made if there is none: DATA= ARCH= LOSS= LABELLED= BASELINE=0
	@$(make-cache)
	@$(SOFTCACHE) student $(if $(RESUMED),,BASELINE=1 $(SEEDS_OF_DIGITS)) $(variables)

students: $(INSTALLED) ## train several students that read each batch once: ARCH='mlp:32 mlp:64 cnn'
	@$(make-cache)
	@$(SOFTCACHE) student BASELINE=1 ARCH='$(ARCHS)' $(variables)

lint: $(INSTALLED) ## check format, style and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

test: $(INSTALLED) ## the default tests, by as many processes as there are processors
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

browser: $(INSTALLED) ## the tests of the report in a browser; needs chromium
	@command -v chromium > /dev/null || { echo "Error: there is no chromium: apt-get install chromium" >&2; exit 2; }
	$(PY) -m pytest -m browser tests/stages/report/test_report_in_browser.py
	$(PY) -m pytest -m browser tests/stages/report/test_report_tasks_in_browser.py

hosts: $(INSTALLED) ## two hosts as network namespaces: killed ranks, links that are cut; needs root and iproute2
	$(PY) -m pytest -m hosts -s tests/stages/distributed/test_hosts.py

slow: $(INSTALLED) ## the long tests, on real data where they are present
	$(PY) -m pytest -m slow

torture: $(INSTALLED) ## kills, flipped bits, hostile files, full disks: the full number of trials
	$(PY) -m pytest --torture -s $$(grep -rl --include='test_*.py' 'dose(' tests)
	$(PY) -m pytest -m hosts --torture -s tests/stages/distributed/test_hosts.py

bench: $(BENCH_INSTALLED) ## measure every claim about speed and size as a ratio: ROW=name,name DATA_ROOT= CIFAR= WEIGHTS=
	$(PY) -m bench $(foreach name,$(GIVEN),--$(shell echo $(name) | tr A-Z_ a-z-) '$($(name))')

gpu-check: $(INSTALLED) ## tests and speed on a GPU, 8 minutes, nothing is downloaded; writes gpu-check.json: DEVICE=
	$(PY) -m bench.gpu_check $(foreach name,$(GIVEN),--$(shell echo $(name) | tr A-Z_ a-z-) '$($(name))')

docs: $(INSTALLED) ## write the generated documents anew: command line, Python, losses, benchmarks
	$(PY) docs/make_cli_reference.py
	$(PY) docs/make_api_reference.py
	$(PY) docs/make_loss_list.py
	$(PY) -m bench.document

check: lint test ## lint and test

clean: ## remove .venv and what tools leave behind; caches, runs and data sets stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
