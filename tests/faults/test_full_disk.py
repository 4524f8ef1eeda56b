"""A run on a full disk warns and goes on; once there is room it saves again."""

from __future__ import annotations

import logging
import subprocess

import pytest

import train
from cxr_vit.training.checkpoint import load_checkpoint

from .runs import STEPS, TRAINING, digests, named_checkpoint

#: Room for the checkpoints that a run keeps and one more, not for many.
SIZE = "48m"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_run_goes_on_with_a_full_disk_and_saves_when_there_is_room(
    small_disk, cached_root, tmp_path, caplog
):
    given = ["--config", "vit_demo", *TRAINING, f"data.root={cached_root}"]
    undisturbed, disturbed = tmp_path / "undisturbed", small_disk / "run"
    assert train.main([*given, f"run.dir={undisturbed}"]) == 0
    caplog.clear()
    # Checkpoints are due at 9, 12 (also a validation), 15 and so on.
    fills = "callbacks=[{class: faults.callbacks.FullDisk, args: {fill: 7, free: 13}}]"
    assert train.main([*given, f"run.dir={disturbed}", fills]) == 0
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    assert any("No space left" in text for text in warnings), warnings
    assert not any("\n" in text for text in warnings), warnings
    last = named_checkpoint(disturbed, "last")
    assert digests(last) == digests(named_checkpoint(undisturbed, "last"))
    steps = sorted((disturbed / "checkpoints").glob("*step_*"))
    assert not [path for path in steps if path.name.startswith(".")], "partial files are left"
    assert all(load_checkpoint(path)[1]["step"] for path in steps)
    assert steps[-1].name == f"step_{STEPS:08d}"
