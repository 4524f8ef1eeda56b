"""The surface of the stand-in, and the results of the same calls on both implementations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Tuple

import pytest

from fakes import loading

from . import comparison, record_api
from .conftest import needs_front_end
from .models import Net


def test_surface_equals_the_recording(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    recorded = json.loads(record_api.API_FILE.read_text(encoding="utf-8"))
    setters = recorded.pop("setters")
    assert json.loads(record_api.as_text(record_api.describe(poptorch))) == recorded
    ours = record_api.setters(poptorch)
    assert len(ours) > 40
    assert {name: setters.get(name) for name in ours} == ours


def _run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(loading.FAKES / "conformance" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_front_end
def test_recording_equals_the_front_end() -> None:
    printed = _run("record_api.py", "--print")
    assert printed == record_api.API_FILE.read_text(encoding="utf-8")
    recorded = json.loads(record_api.OPTIONS_FILE.read_text(encoding="utf-8"))
    assert record_api.session_options(Path(os.environ["POPTORCH_SRC"])) == recorded


@needs_front_end
def test_same_calls_on_the_front_end_have_the_same_results(fake: Tuple[Any, Any]) -> None:
    real = json.loads(_run("comparison.py").splitlines()[-1])
    ours = comparison.everything(*fake)
    assert ours["options"] == real["options"]
    assert ours["optimizers"] == real["optimizers"]
    for what in ("log", "facts", "annotations"):
        assert ours["training"][what] == real["training"][what]
    for what in ("results", "state", "weights"):
        assert _rounded(ours["training"][what]) == _rounded(real["training"][what])


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_rounded(value) for value in content]
    return pytest.approx(content, abs=1e-6)


def test_stand_in_is_removed_after_use() -> None:
    with loading.stand_in() as (poptorch, inspection):
        Net(poptorch)
        inspection.log().record("something")
        inspection.config().available_ipus = 1
    assert "poptorch" not in sys.modules
    assert str(loading.FAKES) not in sys.path
    with loading.stand_in() as (_, inspection):
        assert inspection.log() == []
        assert inspection.config().available_ipus == 16
