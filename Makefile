.PHONY: demo test test-all test-labelstudio test-cluster faults gpu
.DELETE_ON_ERROR:

PYTHON3 = python3
VERSION := $(shell $(PYTHON3) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VERSIONS = 3.10 3.11 3.12 3.13
PYTHON = .venv/bin/python
ISIC = isic2017
STUDIO = 1.23.2
PYTEST = $(PYTHON) -m pytest -n auto --dist loadfile

demo: .venv/installed-$(VERSION)  ## the whole program on synthetic lesions
	$(PYTHON) train.py --preset demo

test: .venv/installed-dev-$(VERSION)  ## the tests but the slow ones
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTEST) -m "not slow and not labelstudio and not cluster"

test-all: test  ## then the slow ones: a process for each case
	$(PYTEST) -m "slow and not labelstudio and not cluster"

# Label Studio lives in an environment of its own, because it needs other versions of NumPy and many more packages.
test-labelstudio: .venv/installed-dev-$(VERSION) .venv-labelstudio/installed-$(STUDIO)  ## a run with Label Studio and a browser
	$(PYTHON) -m pytest tests/test_labelstudio_real.py -s -rs

test-cluster: .venv/installed-cluster-$(VERSION)  ## several machines, played by this one: under 6 minutes; LONG=1: more
	TF_NUM_INTRAOP_THREADS=1 LONG=$(LONG) $(PYTHON) -m pytest -n 2 --dist loadfile -m cluster tests/test_cluster*.py

faults: .venv/installed-dev-$(VERSION)  ## 100 kills of a run, and 100 of one that asks a person
	KILLS=100 $(PYTHON) -m pytest tests/test_faults.py tests/test_oracle.py -s -k again_and_again

# Installs nothing with PYTHON=python3, and needs no network. DRY=1 tries it out on a processor, with tiny sizes.
gpu: $(if $(filter .venv/bin/python,$(PYTHON)),.venv/installed-dev-$(VERSION))  ## what only a GPU can show: 7 minutes
	PYTHON=$(PYTHON) ISIC=$(ISIC) DRY=$(DRY) bash tests/gpu.sh

# A .venv of another Python version is replaced, because its packages would not be found.
.venv/installed-$(VERSION): requirements.txt
	$(if $(filter $(VERSION),$(VERSIONS)),,$(error $(PYTHON3) has version $(or $(VERSION),unknown), and TensorFlow needs \
	  one of $(VERSIONS): install one of these and name it, for example: make $(MAKECMDGOALS) PYTHON3=python3.12))
	$(PYTHON3) -m venv $(if $(wildcard .venv/lib/python$(VERSION)),,--clear) .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev-$(VERSION): requirements-dev.txt .venv/installed-$(VERSION)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv-labelstudio/installed-$(STUDIO):
	$(PYTHON3) -m venv --clear .venv-labelstudio
	.venv-labelstudio/bin/python -m pip install --quiet --disable-pip-version-check label-studio==$(STUDIO)
	touch $@

.venv/installed-cluster-$(VERSION): requirements-cluster.txt .venv/installed-dev-$(VERSION)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-cluster.txt
	touch $@
