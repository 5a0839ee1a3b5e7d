# Each target works alone in a fresh clone: the first one creates .venv and installs everything.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(PY) -m benchmarks.demo

test: $(VENV)/.installed
	$(PY) -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(PY) -m pytest -q tests/test_style.py

bench: $(VENV)/.installed
	$(PY) -m benchmarks.run

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/src/*/* csrc/bindings/* csrc/include/paretofuse/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install torch==2.14.1 torchvision==0.29.1
	$(PY) -m pip install --editable ".[hf,openclip,plot,test]"
	touch $@

clean:
	rm -rf $(VENV) build demo/out
