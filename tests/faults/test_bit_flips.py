"""A checkpoint with any bit of its trainer_state.json flipped is refused."""

from __future__ import annotations

import shutil

import pytest

from cxr_vit.errors import CheckpointError
from cxr_vit.training.checkpoint import verify_checkpoint


@pytest.mark.parametrize(
    "every", [pytest.param(97, id="some"), pytest.param(1, id="all", marks=pytest.mark.faults)]
)
def test_flipped_bit_of_the_state_is_refused(checkpoint, tmp_path, every):
    folder = tmp_path / checkpoint.name
    shutil.copytree(str(checkpoint), str(folder))
    verify_checkpoint(folder)
    path = folder / "trainer_state.json"
    content = path.read_bytes()
    accepted = []
    for bit in range(0, 8 * len(content), every):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        try:
            verify_checkpoint(folder)
        except CheckpointError:
            continue
        accepted.append((bit, bytes(flipped[max(0, bit // 8 - 20) : bit // 8 + 5])))
    assert not accepted, f"{len(accepted)} accepted, first: {accepted[:5]}"
