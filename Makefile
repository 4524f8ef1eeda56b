# make demo        install, train and evaluate the demo (no GPU, no data, no hub needed)
# make test        the test suite in a fresh environment of this Python (3.9 or later)
# make test-all    the same and the cases it leaves out (marked exhaustive): ten minutes more
# make test-sdk34  the same suite on Python 3.8 with the pins of the Poplar SDK 3.4
# make lint        formatter, linter, types, spelling

PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
VENV        ?= .venv
VENV_SDK34  ?= .venv-sdk34
ifndef RUN
RUN         := runs/vit_demo-$(shell date +%Y%m%d-%H%M%S)
endif
# A file of tests stays in one process: it shares what takes long to make.
PARALLEL    ?= -n auto --dist loadfile
PIP         := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all test-sdk34 lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/python train.py --config configs/vit_demo.yaml run.dir=$(RUN)
	$(VENV)/bin/python evaluate.py --checkpoint $(RUN)/checkpoints/best
	@echo
	@echo "The report:       $(RUN)/report (metrics.json, predictions.csv, roc.png)"
	@echo "The curves:       $(VENV)/bin/tensorboard --logdir runs"

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PARALLEL)

test-all: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PARALLEL) -m ""

test-sdk34: $(VENV_SDK34)/.installed-dev
	$(VENV_SDK34)/bin/python -m pytest $(PARALLEL)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell cxr_vit tests configs benchmarks docs/ipu.md docs/planner.md train.py evaluate.py README.md CHANGELOG.md

$(VENV)/.installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -r requirements.txt -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(VENV)/bin/python $(PIP) -r requirements-dev.txt -c $(CONSTRAINTS)
	@touch $@

$(VENV_SDK34)/.installed-dev: requirements-sdk34.txt requirements-dev.txt
	@test -n "$$(sh tests/find_python38.sh)" || { echo "no Python 3.8 on PATH or under pyenv"; exit 1; }
	"$$(sh tests/find_python38.sh)" -m venv $(VENV_SDK34)
	$(VENV_SDK34)/bin/python $(PIP) -r requirements-sdk34.txt -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_SDK34) .pytest_cache .mypy_cache .ruff_cache
