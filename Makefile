# Each target works alone in a fresh clone: it creates .venv and installs what it needs, and nothing else.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# How pip installs PyTorch. The default is what the tests run on, for CPU and CUDA; CONTRIBUTING.md has the small CPU build.
TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: demo test test-long mutants lint docs bench wheels versions clean

demo: $(VENV)/.has-demo
	$(PY) -m benchmarks.demo

# A thread that waits for another sleeps: two workers of two threads each, spinning, take twice as long on two cores.
test: export OMP_WAIT_POLICY := passive
test: $(VENV)/.has-dev
	$(PY) -m pytest -n 2 --dist worksteal --durations=20

test-long: $(VENV)/.has-dev
	$(PY) -m pytest -m long -v

# Not part of the tests: hours for everything. ROOMS="routing training" SAMPLE=100 draws a hundred mutants of each.
mutants: $(VENV)/.has-mutants
	$(PY) -m tests.mutants $(ROOMS) $(if $(SAMPLE),--sample $(SAMPLE))

lint: $(VENV)/.has-dev
	$(PY) -m pytest -q tests/test_style.py

docs: $(VENV)/.has-dev
	$(PY) -m sphinx -W --keep-going -q -c docs . build/docs
	@echo "open build/docs/docs/index.html"

bench: $(VENV)/.has-dev
	$(PY) -m benchmarks.run

wheels: $(VENV)/.has-dev
	$(PY) -m pip install --quiet "cibuildwheel>=3.0"
	$(PY) -m cibuildwheel --output-dir dist

versions:
	$(PYTHON) .ci/versions.py

# The part of the name after "has-" is the extra of pyproject.toml that is installed.
$(VENV)/.has-%: pyproject.toml setup.py $(wildcard csrc/src/*/* csrc/bindings/* csrc/include/paretofuse/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(TORCH)
	$(PY) -m pip install --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo/out
