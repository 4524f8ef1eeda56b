"""Hostile input is read or refused in one message: no traceback, no hang, no gigabyte."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from .guard import within_limits
from .readers import all_readers, names

#: Inputs per reader; a reader that resumes a run gets fewer.
FEW, MANY = 40, int(os.environ.get("FAULTS_EXAMPLES", "10000"))
#: Shrinking an input that takes 5 seconds takes minutes: only on request.
PHASES = [Phase.generate, *([Phase.shrink] if os.environ.get("FAULTS_SHRINK") else [])]


def fuzz(name: str, folder: Path, checkpoint: Path, sample_root: Path, *, examples: int) -> None:
    strategy, read, share = all_readers(folder, checkpoint, sample_root)[name]()

    @settings(
        max_examples=max(3, int(share * examples)),
        derandomize=examples == FEW,
        database=None,
        phases=PHASES,
        deadline=None,  # within_limits has one
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(strategy)
    def check(value):
        within_limits(read, value)

    check()


@pytest.fixture(autouse=True)
def quiet():
    """Warnings of readers would fill the report."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", names())
def test_some_hostile_inputs_are_refused(name, tmp_path, checkpoint, sample_root):
    fuzz(name, tmp_path, checkpoint, sample_root, examples=FEW)


@pytest.mark.faults
@pytest.mark.parametrize("name", names())
def test_many_hostile_inputs_are_refused(name, tmp_path, checkpoint, sample_root):
    fuzz(name, tmp_path, checkpoint, sample_root, examples=MANY)
