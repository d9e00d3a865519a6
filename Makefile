# make            what there is
# Variables map one to one to the commands' options: make student DATA=cifar10 ARCH=cnn LABELLED=100
#   VENV=     the virtual environment, .venv by default, or an interpreter that has the packages
#   PYTHON=   what makes the virtual environment

SHELL := bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
PY := $(shell test -f "$(VENV)" && echo "$(VENV)" || echo "$(VENV)/bin/python")
STAGES := $(PY) -m softcache
QUIET = $(if $(JSON),@)

DATA ?= digits
NAME := $(notdir $(patsubst %/,%,$(patsubst folder:%,%,$(DATA))))
CACHE ?= caches/$(NAME)
BASELINE ?= 1
SEEDS ?= $(if $(filter digits,$(DATA)),5,1)
ARCHS ?= $(if $(filter digits,$(DATA)),mlp:32 mlp:64 cnn,resnet8 cnn mlp:512)

# $(call options,A B …): --a 'value' --b 'value' for those that are set; a switch is set to 1
empty :=
comma := ,
lower = $(subst _,-,$(shell echo $(1) | tr A-Z a-z))
SWITCHES := COMPILE BASELINE RESUME JSON DEEP REPAIR GRID PNG INT8 TENSORBOARD
option = $(if $(filter-out 0,$($(1))),$(if $(filter $(1),$(SWITCHES)),--$(call lower,$(1)),--$(call lower,$(1)) '$($(1))'))
told = $(strip $(foreach name,$(1),$(filter command%,$(origin $(name)))))
options = $(foreach name,$(1),$(call option,$(name)))
LOSSES = $(foreach loss,$(LOSS),--loss '$(loss)')
FROM = $(if $(CACHES),$(foreach cache,$(CACHES),--cache '$(cache)'),--cache '$(CACHE)')
SEARCHED = $(foreach search,$(SEARCH),--search '$(search)') $(if $(filter 0,$(PRUNE)),--no-prune)

MACHINE := DEVICE PRECISION WORKERS JSON
TRAINING := EPOCHS BATCH_SIZE OPTIMIZER LEARNING_RATE MOMENTUM WEIGHT_DECAY SCHEDULE MILESTONES WARMUP CLIP_NORM EMA COMPILE \
  SELECT SAMPLER KEEP_EVERY SEED TENSORBOARD RESUME
DISTILLING := RECIPE COMBINE MAP MISSING DRAWS DRAWS_PER_DECODE ARCH ORDER_SEED FINETUNE_EPOCHS \
  FINETUNE_LEARNING_RATE
STAGE_ONE := TEACHER WEIGHTS NORMALIZE VIEWS DRAWS TAPS CODEC VAL_FRACTION TRAIN_SIZE IMBALANCE HEAD_SIZE \
  SHARD_ROWS LICENSE TOLERANCE
INSPECTING := ROWS REPEATS TEMPERATURE
EXPORTING := INT8 TOLERANCE MOST_DROP
WHERE = --data '$(DATA)' $(call options,DATA_ROOT)

# A variable that nothing reads is a slip: say so instead of doing without it.
KNOWN := PYTHON VENV DATA CACHE CACHES ARCHS LOSS LABELLED BASELINE SEEDS OUT VIEWS DATA_ROOT DEEP REPAIR LICENSE BATCH_SIZE \
  ROW CIFAR GENERATIONS ONLY LAYERS STUDENT_LAYERS TIME_STEPS SEARCH TRIALS GRID TOGETHER PRUNE STORAGE STUDY \
  RUN RUNS MODEL PICTURES TOP SHOW PNG LATENCY $(EXPORTING) $(INSPECTING) $(DISTILLING) \
  $(MACHINE) $(TRAINING) $(STAGE_ONE)
SAID := $(foreach name,$(.VARIABLES),$(if $(filter command%,$(origin $(name))),$(name)))
$(if $(filter-out $(KNOWN) MAKEFLAGS SHELL,$(SAID)),$(error no variable $(filter-out $(KNOWN) MAKEFLAGS SHELL,$(SAID)): there are $(sort $(KNOWN))))

RUNS_ON := torch torchvision h5py numpy click tqdm PIL sklearn scipy safetensors xxhash $(if $(filter-out 0,$(TENSORBOARD)),tensorboard)
PARTS := matplotlib jinja2 optuna onnx onnxscript onnxruntime tensorboard
missing = $(PY) -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))' $(1) 2>/dev/null
# $(call ensure,packages,extras): install when one of them is missing, into a virtual environment of our own
define ensure
@$(call missing,$(1)) || { \
  if [ -f "$(VENV)" ]; then echo "Error: $(VENV) lacks one of: $(1)" >&2; exit 2; fi; \
  echo "installing into $(VENV) (PyTorch is large: a minute or more)" >&2; \
  $(PYTHON) -m venv $(VENV) && $(VENV)/bin/python -m pip install --quiet --upgrade pip && \
  $(VENV)/bin/python -m pip install --quiet -e '.[$(or $(2),dev)]'; }
endef

.PHONY: help install teacher teacher-cache student students blend born-again methods tune compare long-tail \
  check-cache inspect report images export predict lint bench test browser slow torture check clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 16

install: ## make .venv and install everything into it
	$(call ensure,$(RUNS_ON) $(PARTS) pytest hypothesis ruff mypy playwright)

teacher: ## train a teacher: DATA= ARCH= EPOCHS= OUT=
	$(call ensure,$(RUNS_ON))
	$(QUIET)$(STAGES) teacher $(WHERE) $(call options,ARCH VIEWS NORMALIZE VAL_FRACTION TRAIN_SIZE IMBALANCE HEAD_SIZE OUT $(TRAINING) $(MACHINE))

teacher-cache: ## stage one: run the teacher once, keep what it said: DATA= TEACHER= WEIGHTS= VIEWS= DRAWS= TAPS=
	$(call ensure,$(RUNS_ON))
	$(QUIET)$(STAGES) teacher-cache $(WHERE) --out '$(CACHE)' $(call options,$(STAGE_ONE) COMPILE BATCH_SIZE SEED $(MACHINE))

student: ## stage two: train a student from the cache, which is made when there is none: DATA= ARCH= LOSS= LABELLED=
	$(call ensure,$(RUNS_ON))
	$(make-cache)
	$(QUIET)$(STAGES) student $(WHERE) $(FROM) $(LOSSES) \
	  $(call options,$(DISTILLING) LABELLED BASELINE SEEDS OUT $(TRAINING) $(MACHINE))

students: ## several students from the one cache: ARCHS="mlp:32 mlp:64 cnn"
	$(call ensure,$(RUNS_ON))
	$(make-cache)
	$(QUIET)for arch in $(ARCHS); do $(STAGES) student $(WHERE) $(FROM) $(LOSSES) --arch $$arch \
	  $(call options,$(filter-out ARCH,$(DISTILLING)) LABELLED BASELINE SEEDS $(TRAINING) $(MACHINE)); done

blend: ## what several caches make of one another, without training: CACHES='caches/a caches/b'
	$(call ensure,$(RUNS_ON))
	$(QUIET)$(STAGES) blend $(FROM) $(call options,COMBINE JSON)

born-again: ## a chain of students, each the next one's teacher: GENERATIONS=3, or ARCHS=resnet32+resnet20+resnet8
	$(call ensure,$(RUNS_ON))
	$(make-cache)
	$(QUIET)$(STAGES) born-again $(WHERE) $(FROM) $(LOSSES) \
	  $(call options,$(if $(filter command%,$(origin ARCHS)),ARCHS) GENERATIONS BASELINE $(DISTILLING) OUT $(TRAINING) $(MACHINE))

methods: ## one student by every loss on one cache, gains and costs: DATA= ARCH= LAYERS=layer1+layer2+layer3 ONLY=kd,dkd
	$(call ensure,$(RUNS_ON))
	$(make-cache)
	$(QUIET)$(STAGES) methods $(WHERE) $(FROM) \
	  $(call options,ONLY LAYERS STUDENT_LAYERS TIME_STEPS $(DISTILLING) OUT $(TRAINING) $(MACHINE))

tune: ## search loss weights and training settings: SEARCH='kd.temperature=1..20:log ema=0|0.9' TRIALS=40 SELECT=f1_macro
	$(call ensure,$(RUNS_ON) optuna)
	$(make-cache)
	$(QUIET)$(STAGES) tune $(WHERE) $(FROM) $(LOSSES) $(SEARCHED) \
	  $(call options,TRIALS GRID TOGETHER STORAGE STUDY $(DISTILLING) LABELLED OUT $(TRAINING) $(MACHINE))

compare: ## are students told apart, or is it chance; of one run, its student and its baseline: RUNS='runs/a runs/b'
	$(call ensure,$(RUNS_ON))
	$(QUIET)$(STAGES) compare $(foreach run,$(RUNS),'$(run)') $(call options,JSON)

# A cache is made when there is none; it is compared with what is asked for when something is.
define make-cache
$(if $(CACHES),,$(made-or-compared))
endef
made-or-compared = $(if $(strip $(foreach name,$(STAGE_ONE),$($(name)))),$(QUIET),@test -f '$(CACHE)/manifest.json' ||) \
  $(STAGES) teacher-cache $(WHERE) --out '$(CACHE)' $(call options,$(STAGE_ONE) DEVICE WORKERS)$(if $(JSON), >&2)

# Each row: the name of a run, then what its student learns from. Runs that are there are not trained again.
LONG_TAIL := runs/long-tail
define LONG_TAIL_ROWS
hard --loss hard
kd --loss kd:temperature=4,weight=0.9 --loss hard:weight=0.1
kd-prior --map prior --loss kd:temperature=4,weight=0.9 --loss logit_adjusted:weight=0.1
balanced-kd --loss hard --loss balanced_kd
dive --map prior --loss balanced_softmax:weight=0.5 --loss dive:weight=0.5
f1 --recipe f1
endef
export LONG_TAIL_ROWS
long-tail: DATA := mnist
long-tail: CUT := --imbalance 100 --head-size 1000
long-tail: ## rare classes: a long tail of MNIST, six ways to learn it, 5 seeds each, side by side: DATA_ROOT=
	$(call ensure,$(RUNS_ON))
	@test -f $(LONG_TAIL)/teacher/result.json || \
	  $(STAGES) teacher $(WHERE) $(CUT) --arch mlp:800,800 --views none --epochs 40 \
  --learning-rate 0.02 --weight-decay 5e-4 --out $(LONG_TAIL)/teacher
	@test -f caches/mnist-long-tail/manifest.json || \
	  $(STAGES) teacher-cache $(WHERE) $(CUT) --weights $(LONG_TAIL)/teacher --out caches/mnist-long-tail
	@echo "$$LONG_TAIL_ROWS" | while read -r name losses; do test -f $(LONG_TAIL)/$$name/result.json || \
	  $(STAGES) student $(WHERE) --cache caches/mnist-long-tail --arch mlp:128 --epochs 40 --seeds 5 $$losses \
	  --out $(LONG_TAIL)/$$name < /dev/null; done
	@$(STAGES) compare $(foreach name,hard kd kd-prior balanced-kd dive f1,$(LONG_TAIL)/$(name))

check-cache: ## is the cache whole? DATA= or CACHE=; DEEP=1 renders every view again, REPAIR=1 asks the teacher for bad shards
	$(call ensure,$(RUNS_ON))
	$(QUIET)$(STAGES) check-cache '$(CACHE)' $(if $(DEEP)$(REPAIR),$(WHERE)) \
	  $(call options,DEEP REPAIR WEIGHTS DEVICE WORKERS JSON)

inspect: ## which taps, channels, classes and temperatures matter: DATA= or CACHE=; ROWS= REPEATS= TEMPERATURE= OUT=
	$(call ensure,$(RUNS_ON) matplotlib)
	$(QUIET)$(STAGES) inspect '$(CACHE)' $(call options,$(INSPECTING) SEED OUT JSON)

report: ## runs as one page to look at: RUNS='runs/a runs/b', all when not said; OUT= DATA_ROOT= PNG=1
	$(call ensure,$(RUNS_ON) matplotlib jinja2)
	$(QUIET)$(STAGES) report $(RUNS) $(if $(call told,DATA),--data '$(DATA)') \
	  $(call options,DATA_ROOT OUT SHOW PNG JSON) $(if $(filter 0,$(LATENCY)),--no-latency)

# Each row: the name of a run, then its arch and losses.
PICTURED := runs/images
define PICTURED_ROWS
mlp-8 mlp:8
mlp-16 mlp:16
mlp-32 mlp:32
mlp-64 mlp:64
mlp-256 mlp:256
cnn cnn --loss kd --loss hint:teacher=flatten,student=flatten,weight=0.1
endef
export PICTURED_ROWS
images: ## the images of the README, docs/*.png, from six students of digits, 3 seeds each
	$(call ensure,$(RUNS_ON) matplotlib jinja2)
	@test -f caches/images/manifest.json || $(STAGES) teacher-cache --taps flatten --out caches/images
	@echo "$$PICTURED_ROWS" | while read -r name arch losses; do test -f $(PICTURED)/$$name/result.json || \
	  $(STAGES) student --cache caches/images --arch $$arch --seeds 3 --baseline $$losses \
	  --out $(PICTURED)/$$name < /dev/null; done
	$(STAGES) report $(foreach row,mlp-8 mlp-16 mlp-32 mlp-64 mlp-256 cnn,$(PICTURED)/$(row)) --png --out $(PICTURED)/report
	mkdir -p docs
	cp $(PICTURED)/report/digits-costs.png docs/costs.png
	cp $(PICTURED)/report/runs-images-cnn-curves.png docs/curves.png
	! command -v chromium > /dev/null || chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,1100 \
	  --screenshot=docs/report.png file://$(CURDIR)/$(PICTURED)/report/report.html 2> /dev/null

# Where data and cache lie is said when it is not where the run says.
export: ## a finished student as ONNX, pt2 and safetensors, with a model card: RUN= INT8=1 TOLERANCE= MOST_DROP=
	$(call ensure,$(RUNS_ON) onnx onnxscript onnxruntime)
	$(QUIET)$(STAGES) export '$(or $(RUN),$(error say which run: make export RUN=runs/digits-mlp-64-1))' \
	  $(if $(call told,DATA),--data '$(DATA)') $(call options,DATA_ROOT) $(if $(call told,CACHE CACHES),$(FROM)) \
	  $(call options,$(EXPORTING) JSON)

predict: ## what an exported student says of images: MODEL=runs/r/student.onnx PICTURES='a.png b.png' TOP=
	$(call ensure,$(RUNS_ON) onnx onnxscript onnxruntime)
	$(QUIET)$(STAGES) predict '$(MODEL)' $(foreach image,$(PICTURES),'$(image)') $(call options,TOP JSON)

lint: ## format, lint and types
	$(call ensure,$(RUNS_ON) $(PARTS) ruff mypy)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: ## every promise about speed and size as a ratio: ROW=name,name DATA_ROOT= (MNIST) CIFAR= (JPEGs) WEIGHTS= (ResNet-56)
	$(call ensure,$(RUNS_ON) torchdistill lmdb webdataset,dev$(comma)bench)
	$(PY) -m bench $(call options,DATA_ROOT CIFAR WEIGHTS DEVICE) $(ROW)

test: ## the default test suite, by as many processes as there are processors
	$(call ensure,$(RUNS_ON) $(PARTS) pytest xdist hypothesis playwright)
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

browser: ## the report in a browser: wants the system's chromium
	$(call ensure,$(RUNS_ON) $(PARTS) pytest playwright)
	@command -v chromium > /dev/null || { echo "Error: no chromium here: apt-get install chromium" >&2; exit 2; }
	$(PY) -m pytest -m browser tests/stages/report/test_report_in_browser.py

slow: ## the long tests on real data
	$(call ensure,$(RUNS_ON) pytest hypothesis)
	$(PY) -m pytest -m slow

torture: ## kills, flipped bits, hostile files, full disks: the full number of trials
	$(call ensure,$(RUNS_ON) pytest hypothesis)
	$(PY) -m pytest --torture -s $$(grep -rl --include='test_*.py' 'dose(' tests)

check: lint test ## lint and test

clean: ## remove .venv and what tools leave behind; caches, runs and datasets stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
