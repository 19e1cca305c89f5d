# make demo   the whole path on one machine, about 10 minutes on 2 cores after installation
# make test   the test suite
PYTHON ?= python3
PY := .venv/bin/python
DEMO := output/demo
DATA := $(DEMO)/data

.PHONY: setup demo demo-data demo-compare demo-teacher test lint clean
.DELETE_ON_ERROR:

setup: .venv/installed

# uv installs the same files faster where it is present; it is never required.
.venv/installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	if command -v uv >/dev/null; then uv pip install --python $(PY) -r requirements.txt; \
	else $(PY) -m pip install -r requirements.txt; fi
	touch $@

test: setup
	$(PY) -m pytest

lint: setup
	$(PY) -m ruff check .

clean:
	rm -rf output
