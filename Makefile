# `make help` lists the targets. PYTHON3 is the interpreter for the virtual environment (3.11 or 3.12).
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTHON3 ?= $(shell for p in python3.11 python3.12 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' && echo $$p && break; done)
# Number of test processes; each uses one thread. They and their child processes write Python's compiled files.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PYTHON) -m pytest
# Tests with other packages run in separate environments: make lerobot, openpi, metaworld-test.
HERE := not lerobot and not openpi and not metaworld and not lmms and not opencv and not mapanything

.DEFAULT_GOAL := help
METAWORLD := .venv-metaworld
# Demonstrations per task, training steps and episodes of `make metaworld`; the folders of its data and of its run, which
# resumes after an interruption.
DEMOS ?= 20
STEPS ?= 1500
EPISODES ?= 20
METAWORLD_DATA ?= data/metaworld-mt10-$(DEMOS)
METAWORLD_RUN ?= runs/metaworld-mt10-$(DEMOS)-$(STEPS)

.PHONY: help install gl metaworld metaworld-install metaworld-test demo test test-all oldest openpi lmms charuco mapanything lint bench notebooks doctor lerobot clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) gl ## virtual environment in .venv with all packages, and a GL library if it may be installed

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON3)" || { echo "keygrip needs Python 3.11 or 3.12: install it, or say make PYTHON3=/path/to/python3.11" >&2; exit 1; }
	@test -x $(PYTHON) || $(PYTHON3) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "no venv module: apt-get install python3-venv (as root), then make again" >&2; exit 1; }
	@echo "installing packages (7 GB with torch, 10 while it installs; minutes)"
	$(PYTHON) -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt torch torchvision -e '.[dev,vlm]'
	@touch $(STAMP)

# On Linux the simulator renders with EGL or OSMesa.
gl:
	@if [ "$$(uname)" = Linux ] && ! { ldconfig -p 2>/dev/null || /sbin/ldconfig -p; } | grep -qE 'libEGL\.so|libOSMesa\.so'; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing a GL library for the simulator"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libegl1 libgl1 >/dev/null; \
		else \
			echo "the simulator needs a GL library: sudo apt-get install libegl1 libgl1 (or your system's EGL or OSMesa)" >&2; \
		fi; \
	fi

demo: install ## record simulated demonstrations, train on them, evaluate in closed loop: 5 minutes on two cores
	$(PYTHON) -m keygrip.demo

test: install ## all quick tests
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not gpu and $(HERE)"

test-all: install ## all tests, including slow tests and tests that need a GPU
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "$(HERE)"

# In a separate environment, because the client requires numpy below 2.
openpi: install ## the policy server against the real openpi-client, installed in .venv-openpi
	test -x .venv-openpi/bin/python || $(PYTHON3) -m venv .venv-openpi
	.venv-openpi/bin/python -m pip install --disable-pip-version-check -q 'openpi-client==0.1.2' typing_extensions  # imported by openpi-client but not among its dependencies
	OPENPI_PYTHON=.venv-openpi/bin/python $(PYTEST) -m openpi tests/runtime/test_openpi.py

# In a separate environment, because lmms-eval pins some of our packages to other versions.
lmms: ## the adapter against the real lmms-eval, installed in .venv-lmms
	test -x .venv-lmms/bin/python || $(PYTHON3) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints-lmms.txt \
		'lmms-eval==0.7.3' -e '.[lmms]' pytest
	OMP_NUM_THREADS=1 .venv-lmms/bin/python -m pytest -m lmms tests/evaluation/test_lmms.py

# In a separate environment, because only `prepare step=charuco` needs OpenCV.
charuco: install ## the calibration with a ChArUco board, with OpenCV installed in .venv-opencv
	test -x .venv-opencv/bin/python || $(PYTHON) -m venv --system-site-packages .venv-opencv
	.venv-opencv/bin/python -m pip install --disable-pip-version-check -q --no-deps --target .venv-opencv/only opencv-python-headless
	PYTHONPATH=.venv-opencv/only $(PYTEST) -m opencv tests/data/robot/test_charuco.py

# In a separate environment with our packages and the packages that its model imports. The code of its DINOv2, without
# weights, comes from torch.hub. Offline: MAPANYTHING=FOLDER with its source, and TORCH_HOME.
MAPANYTHING ?= mapanything @ git+https://github.com/facebookresearch/map-anything.git@f7ebafb4d8349776705aaa686cf928988d1bd7f4
mapanything: install ## our geometry tokens against the real MapAnything, installed in .venv-mapanything
	test -x .venv-mapanything/bin/python || $(PYTHON) -m venv --system-site-packages .venv-mapanything
	.venv-mapanything/bin/python -m pip install --disable-pip-version-check -q --no-deps --target .venv-mapanything/only \
		'$(MAPANYTHING)' uniception==0.1.7 einops jaxtyping wadler-lindig opencv-python-headless
	PYTHONPATH=.venv-mapanything/only $(PYTEST) -m mapanything tests/models/geometry_vla/test_real_mapanything.py

# Resolved by uv, because pip has no option for the oldest versions.
OLDEST := .venv-oldest
oldest: gl ## the quick tests with the oldest packages that pyproject.toml allows, in .venv-oldest
	test -x $(OLDEST)/bin/python || $(PYTHON3) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q uv
	$(OLDEST)/bin/python -m uv pip install -q --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[dev,vlm]'
	$(subst $(VENV)/,$(OLDEST)/,$(PYTEST)) -n $(WORKERS) --dist worksteal -m "not slow and not gpu and $(HERE)"

lint: install ## style, types and layers
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports

bench: install ## measure: make bench, or make bench CASE=volume_loss
	$(PYTHON) -m keygrip.bench $(if $(CASE),case=$(CASE))

notebooks: install ## run the notebooks
	$(PYTEST) tests/test_notebooks.py

metaworld-install: install $(METAWORLD)/.installed ## Meta-World in a separate environment, .venv-metaworld

$(METAWORLD)/.installed: constraints-metaworld.txt pyproject.toml
	@test -x $(METAWORLD)/bin/python || $(PYTHON) -m venv $(METAWORLD)
	$(METAWORLD)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q \
		-c constraints-metaworld.txt metaworld av pillow safetensors tqdm packaging
	$(METAWORLD)/bin/python -m pip install --disable-pip-version-check -q --no-deps -e .
	@touch $@

metaworld-test: metaworld-install ## tests of Meta-World's environment, recorder and rollouts
	METAWORLD_PYTHON=$(CURDIR)/$(METAWORLD)/bin/python $(PYTEST) -m metaworld tests/envs/metaworld

metaworld: metaworld-test ## record MT10, train one policy, evaluate it on held-out positions
	$(PYTHON) -m keygrip.prepare step=record env=metaworld tasks=mt10 demos=$(DEMOS) 'cameras=[corner2,topview]' root=$(METAWORLD_DATA)
	$(PYTHON) -m keygrip.train experiment=metaworld_two_cameras data.root=$(METAWORLD_DATA) max_steps=$(STEPS) run_dir=$(METAWORLD_RUN) $(if $(wildcard $(METAWORLD_RUN)/checkpoints/last.ckpt),resume=true)
	$(PYTHON) -m keygrip.evaluate checkpoint=$(METAWORLD_RUN) env=metaworld open_loop=false episodes=$(EPISODES)

doctor: install ## check a folder of robot demonstrations before training: make doctor DATA=path/to/folder
	@test -n "$(DATA)" || { echo "say which folder: make doctor DATA=path/to/folder" >&2; exit 1; }
	$(PYTHON) -m keygrip.prepare step=doctor root="$(DATA)"

# LeRobot 0.4.4 needs an older torch than keygrip, so it has a separate environment, with Python 3.11.
LEROBOT := .venv-lerobot
PYTHON311 ?= $(shell command -v python3.11)

$(LEROBOT)/.installed: constraints-lerobot.txt pyproject.toml plugins/lerobot_policy_keygrip/pyproject.toml
	@test -n "$(PYTHON311)" || { echo "LeRobot 0.4.4 is tested on Python 3.11: install it, or say make lerobot PYTHON311=/path/to/python3.11" >&2; exit 1; }
	@test -x $(LEROBOT)/bin/python || $(PYTHON311) -m venv $(LEROBOT)
	@echo "installing lerobot and its packages (7 GB with torch; minutes)"
	$(LEROBOT)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints-lerobot.txt \
		'lerobot[smolvla]==0.4.4' pytest -e '.[serve]' -e plugins/lerobot_policy_keygrip
	@touch $@

lerobot: $(LEROBOT)/.installed gl ## LeRobot in .venv-lerobot, and the tests of our data sets and policies inside it
	OMP_NUM_THREADS=1 $(LEROBOT)/bin/python -m pytest -m lerobot tests/lerobot

clean: ## remove the virtual environment and caches; data/ and runs/ stay
	rm -rf $(VENV) $(OLDEST) .venv-openpi .venv-lmms .venv-opencv .venv-mapanything $(METAWORLD) $(LEROBOT) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
