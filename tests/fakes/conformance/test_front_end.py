"""`pytest --front-end`, which `make test-frontend` runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fakes import loading

from .conftest import needs_front_end

DOCS = loading.ROOT / "docs" / "ipu.md"


def run_pytest(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--front-end"]
    tests = "tests/fakes/conformance"
    return subprocess.run(
        [*command, *words, f"{tests}/test_popdist.py", f"{tests}/test_compiling.py"],
        cwd=str(loading.ROOT),
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("source", ["", "{here}"])
def test_missing_sources_are_told_in_a_line(source: str, tmp_path: Path) -> None:
    done = run_pytest(POPTORCH_SRC=source.format(here=tmp_path))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no checkout of graphcore/poptorch" in done.stdout or "is not set" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


@needs_front_end
def test_summary_of_the_front_end_counts_tests() -> None:
    done = run_pytest()
    assert done.returncode == 0, done.stdout
    (number,) = re.findall(r"^(\d+) tests ran on it, and 0 of them failed$", done.stdout, re.M)
    (passed,) = re.findall(r"^(\d+) passed", done.stdout, re.M)
    assert 0 < int(number) < int(passed)
    assert "0 tests were skipped" in done.stdout and loading.GAPS[-1] in done.stdout


@needs_front_end
def test_no_test_on_the_front_end_is_a_failure() -> None:
    done = run_pytest("-k", "popdist")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "0 tests ran on it" in done.stdout and " passed" in done.stdout


@pytest.mark.parametrize("gap", loading.GAPS)
def test_docs_name_what_the_harness_does_not_show(gap: str) -> None:
    section = DOCS.read_text(encoding="utf-8").partition("## 12.")[2]
    assert gap in " ".join(section.split())


@needs_front_end
def test_import_path_of_the_front_end() -> None:
    code = "import poptorch; print(poptorch.__version__, poptorch.poptorch_core.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(loading.FAKES / "front_end")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert re.match(r"3\.4\.0\S* .*poptorch_core\.py$", done.stdout)
