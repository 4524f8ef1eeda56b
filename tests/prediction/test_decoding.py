"""Decoding in order, whatever happens to the processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import List

import numpy as np
import pytest
from deadly import Deadly

from cxr_vit.data.cache import CacheSettings
from cxr_vit.prediction.decoding import Chunk, chunks_of, in_order


@pytest.fixture
def files(sample_root: Path, tmp_path: Path) -> List[str]:
    """65 files, of which two end the process that reads them."""
    (tmp_path / "absent.png").symlink_to("nowhere")
    images = sorted((sample_root / "images").iterdir())[:62]
    for number, image in enumerate(images):
        shutil.copy(str(image), str(tmp_path / f"{number:03d}.png"))
    for name in ("020_deadly.png", "040_deadly.png"):
        shutil.copy(str(images[0]), str(tmp_path / name))
    return sorted(map(str, tmp_path.iterdir()))


def test_a_file_that_ends_its_process_has_an_error_and_the_others_are_read(files):
    chunks = chunks_of(files, 25, [False] * len(files))
    read = list(in_order(chunks, Deadly(32, 64), workers=2))
    assert [chunk.first for chunk in read] == [0, 25, 50]
    assert [path for chunk in read for path in chunk.paths] == files
    errors = {
        Path(path).name: file.error
        for chunk in read
        for path, file in zip(chunk.paths, chunk.files)
        if file.error
    }
    assert list(errors) == ["020_deadly.png", "040_deadly.png", "absent.png"]
    assert "the process that decoded it ended" in errors["020_deadly.png"]
    for chunk in read:
        for path, pixels, file in zip(chunk.paths, chunk.pixels(32), chunk.files):
            # One that cannot be used is black.
            expected = np.zeros((32, 32)) if file.error else CacheSettings(32, 64).decode(path)
            assert (pixels == expected).all()


def test_chunks_begin_where_those_of_a_whole_run_do():
    paths = list("abcdefgh")
    done = [True, True, True, True, False, True, False, False]
    assert chunks_of(paths, 3, done) == [Chunk(3, list("def")), Chunk(6, list("gh"))]
