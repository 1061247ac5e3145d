.PHONY: demo test test-all faults
.DELETE_ON_ERROR:

PYTHON = .venv/bin/python
PYTEST = $(PYTHON) -m pytest -n auto --dist loadfile

demo: .venv/installed  ## the whole program on synthetic lesions
	$(PYTHON) train.py --preset demo

test: .venv/installed-dev  ## the tests but the slow ones
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTEST) -m "not slow"

test-all: test  ## then the slow ones: a process for each case
	$(PYTEST) -m slow

faults: .venv/installed-dev  ## 100 kills of a run, and 100 of one that asks a person
	KILLS=100 $(PYTHON) -m pytest tests/test_faults.py tests/test_oracle.py -s -k again_and_again

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
