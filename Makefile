# make demo        install, train and score the demo (no GPU, no real images, no model hub)
# make setup       install what development needs into .venv
# make test        the test suite on this Python (3.9 or later)
# make test-all    the same with the cases marked exhaustive: ten minutes more
# make test-sdk34  the same suite on Python 3.8 with the pins of the Poplar SDK 3.4
# make lint        formatter, linter, types, spelling
# make picture     redraw docs/architecture.md's picture from the code

PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
VENV        ?= .venv
VENV_SDK34  ?= .venv-sdk34
ifndef RUN
RUN         := runs/vit_demo-$(shell date +%Y%m%d-%H%M%S)
endif
# All tests of a file run in one process, because they share fixtures that are slow to make.
PARALLEL    ?= -n auto --dist loadfile
PIP         := -m pip install --quiet --disable-pip-version-check
SPELLED     := cxr_vit tests configs benchmarks docs .github .ci train.py evaluate.py Makefile \
               $(wildcard *.md *.toml *.txt *.cff .*.yaml)

.PHONY: demo setup test test-all test-sdk34 lint picture clean

demo: $(VENV)/.installed
	$(VENV)/bin/python train.py --config configs/vit_demo.yaml run.dir=$(RUN)
	$(VENV)/bin/python evaluate.py --checkpoint $(RUN)/checkpoints/best
	@echo
	@echo "The report:       $(RUN)/report (metrics.json, predictions.csv, roc.png)"
	@echo "The curves:       $(VENV)/bin/tensorboard --logdir runs"

setup: $(VENV)/.installed-dev

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
	$(VENV)/bin/codespell $(SPELLED)

picture: $(VENV)/.installed-dev
	$(VENV)/bin/python -m docs.draw_architecture

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
