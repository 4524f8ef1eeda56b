"""A long run needs no more memory, files or threads than a short one."""

from __future__ import annotations

import signal
from typing import List

import pytest

from .runs import SMALL

#: Validations until caches and pools have their size.
WARM = 30
EVERY, STEPS = 20, 2000


@pytest.mark.faults
def test_memory_files_and_threads_stay_constant(server, cached_root, tmp_path):
    samples = tmp_path / "samples.txt"
    given = [*SMALL, f"data.root={cached_root}", f"run.dir={tmp_path / 'run'}"]
    given += [f"train.steps={STEPS}", f"train.eval_every_steps={EVERY}", "data.num_workers=2"]
    given += ["train.log_every_steps=10", "train.checkpoint_every_steps=100"]
    soak = f"callbacks=[{{class: faults.callbacks.Soak, args: {{path: '{samples}'}}}}]"
    process = server.start([*given, soak], tmp_path / "output.txt")
    try:
        assert process.wait(900) == 0, process.text
    finally:
        process.signal(signal.SIGKILL, group=True)
    rows: List[List[float]] = [
        [float(word) for word in line.split()] for line in samples.read_text().splitlines()
    ]
    assert len(rows) == STEPS // EVERY
    memory, files, threads = zip(*(row[1:] for row in rows[WARM:]))
    print(f"memory {min(memory):.1f} to {max(memory):.1f} MiB, {set(files)} files")
    assert max(memory) <= 1.02 * memory[0]
    assert len(set(files)) == 1, files
    assert len(set(threads)) == 1, threads
