"""Fixtures: both implementations of PopTorch, and the two commands."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import torch

from fakes import loading

from .commands import ROOT, TORCH, Commands, Run

#: These take minutes, and an IPU host has the environment of the SDK.
SLOW = (
    "test_equivalence.py",
    "test_graphs.py",
    "test_knobs.py",
    "test_processes.py",
    "test_recipes.py",
    "test_state.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Leave slow tests to the environment of the SDK (make test-sdk34) where there is one."""
    find = ["sh", str(ROOT / "tests" / "find_python38.sh")]
    if sys.version_info < (3, 9) or not subprocess.run(find, stdout=subprocess.PIPE).stdout.strip():
        return
    folder = Path(__file__).parent
    for item in items:
        if item.path.parent == folder and item.path.name in SLOW:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove environment variables that PopTorch and the launchers read."""
    for name in (
        "POPTORCH_CACHE_DIR",
        "POPTORCH_IPU_MODEL",
        "POPLAR_ENGINE_OPTIONS",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "DATASET_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(ROOT))
    # The commands and PopTorch use the random generator of the process.
    with torch.random.fork_rng(devices=[]):
        yield


def _poptorch(which: str) -> Iterator[Tuple[Any, Any]]:
    reason = loading.available() if which == "front end" else None
    if reason:
        pytest.skip(reason)
    context = loading.stand_in if which == "stand-in" else loading.frontend
    with context() as modules:
        yield modules


@pytest.fixture(params=["stand-in", "front end"])
def ipu(request: pytest.FixtureRequest) -> Iterator[Tuple[Any, Any]]:
    """PopTorch and its inspection: the stand-in, then PopTorch's real front end."""
    yield from _poptorch(request.param)


@pytest.fixture
def front_end() -> Iterator[Tuple[Any, Any]]:
    """PopTorch's real front end only."""
    yield from _poptorch("front end")


@pytest.fixture
def commands(sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """train.py and evaluate.py on a small data set."""
    return Commands(sample_root, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def torch_run(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Run on the torch engine, once per set of overrides."""
    done: Dict[Tuple[str, ...], Run] = {}

    def run(*overrides: str) -> Run:
        if overrides not in done:
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.syspath_prepend(str(ROOT))
                folder = tmp_path_factory.mktemp("torch")
                done[overrides] = Commands(sample_root, folder, monkeypatch).train(
                    *overrides, *TORCH
                )
        return done[overrides]

    return run


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Log of the package, including level INFO."""
    caplog.set_level(logging.INFO, logger="cxr_vit")
    return caplog
