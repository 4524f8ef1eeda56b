"""Fixtures of the tests of faults."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Iterator

import pytest

from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.config import load_config

from .forking import Server
from .runs import SMALL


@pytest.fixture(scope="module", autouse=True)
def visible_objects() -> Iterator[None]:
    """Undo `freeze` of tests/conftest.py: Hypothesis looks for references to its generators."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that starts `train` at once."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def cached_root(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the synthetic data set whose cache no other test uses."""
    root = tmp_path_factory.mktemp("data") / "sample"
    shutil.copytree(str(sample_root), str(root))
    return root


@pytest.fixture(scope="module")
def checkpoint(cached_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of two steps; copy it before you change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    given = [*SMALL, f"data.root={cached_root}", f"run.dir={folder}", "train.steps=2"]
    config = load_config([], [*given, "loggers=[]"])
    data = ChestXrayDataModule(config)
    Trainer(config).fit(ViTModule(config, data), data)
    return folder / "checkpoints" / "step_00000002"
