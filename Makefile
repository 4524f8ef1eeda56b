# make demo        install, train and score the demo (no GPU, no real images, no model hub)
# make setup       install what development needs into .venv
# make test        the test suite on this Python (3.9 or later)
# make test-all    the same with the cases marked exhaustive: ten minutes more
# make test-faults the tests of faults in full: about an hour; FAULTS_EXAMPLES=500 is shorter
# make test-sdk34  the same suite on Python 3.8 with the pins of the Poplar SDK 3.4
# make test-frontend the tests of PopTorch on its real front end: POPTORCH_SRC=<checkout>
# make lint        formatter, linter, types, spelling
# make docs        the documentation, into site/; a warning is an error
# make dist        sdist and wheel, into dist/
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
               $(wildcard *.md *.toml *.txt *.cff *.in *.yml .*.yaml notebooks)
# What the tests need besides requirements.txt.
DEV         := requirements-dev.txt requirements-dicom.txt requirements-export.txt \
               requirements-loggers.txt requirements-parquet.txt

.PHONY: demo setup test test-all test-faults test-sdk34 test-frontend lint docs dist picture clean

demo: $(VENV)/.installed
	$(VENV)/bin/python train.py --config configs/vit_demo.yaml run.dir=$(RUN)
	$(VENV)/bin/python evaluate.py --checkpoint $(RUN)
	@echo
	@echo "The report:         $(RUN)/report (report.html, metrics.json, predictions.csv)"
	@echo "The curves:         $(VENV)/bin/tensorboard --logdir runs"
	@echo "What was trained:   notebooks/chest_xray_walkthrough.ipynb, step by step"
	@echo "The documentation:  docs/index.md, or make docs and open site/index.html"

setup: $(VENV)/.installed-dev

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PARALLEL)

test-all: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "not faults"

# One process: the soak test and the kills measure time and memory.
test-faults: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m "" tests/faults

test-sdk34: $(VENV_SDK34)/.installed-dev
	$(VENV_SDK34)/bin/python -m pytest $(PARALLEL)

# Needs graphcore/poptorch 3.4 in POPTORCH_SRC and the harness (POPTORCH_FRONTEND); fetches neither.
test-frontend: $(VENV_SDK34)/.installed-dev
	$(VENV_SDK34)/bin/python -m pytest $(PARALLEL) --front-end -m "not faults"

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell $(SPELLED)

docs: $(VENV)/.installed-docs
	$(VENV)/bin/mkdocs build --strict --quiet
	@echo "open site/index.html"

dist: $(VENV)/.installed-dev
	$(VENV)/bin/python -m build --outdir dist

picture: $(VENV)/.installed-dev
	$(VENV)/bin/python -m docs.draw_architecture

$(VENV)/.installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -r requirements.txt -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(DEV)
	$(VENV)/bin/python $(PIP) $(DEV:%=-r %) -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev requirements-docs.txt
	$(VENV)/bin/python $(PIP) -r requirements-docs.txt -c $(CONSTRAINTS)
	@touch $@

$(VENV_SDK34)/.installed-dev: requirements-sdk34.txt $(DEV)
	@test -n "$$(sh tests/find_python38.sh)" || { echo "no Python 3.8 on PATH or under pyenv"; exit 1; }
	"$$(sh tests/find_python38.sh)" -m venv $(VENV_SDK34)
	$(VENV_SDK34)/bin/python $(PIP) -r requirements-sdk34.txt $(DEV:%=-r %)
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_SDK34) .pytest_cache .mypy_cache .ruff_cache build dist site *.egg-info
