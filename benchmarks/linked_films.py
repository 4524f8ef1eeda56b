"""Data sets of any size out of a few real films: each is linked under many names."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import List, Sequence

from cxr_vit.data.sample import CSV_HEADER, CSV_NAME

__all__ = ["NIH", "link_films", "original_films", "write_linked_set"]

#: NIH's real files, which lie beside the repository on some machines.
NIH = Path(__file__).resolve().parents[2] / "shared" / "data" / "nih"


def original_films(folder: Path) -> List[Path]:
    """Return the PNGs of a folder; without any, say so and exit with status 2."""
    films = sorted(folder.glob("*.png"))
    if not films:
        print(
            f"there are no films (*.png) in {folder}. Give a folder of NIH's original 1024 x 1024"
            " films with --films DIR.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return films


def link_films(originals: Sequence[Path], paths: Sequence[Path]) -> None:
    """Put film i modulo their number at path i: one copy each, the others are hard links to it.

    What is there already stays. The copy keeps the links off the originals, which may be read-only
    or on another disk; where a file system has no hard links, symbolic ones serve.
    """
    for place, path in enumerate(paths):
        if path.exists():
            continue
        if place < len(originals):
            shutil.copyfile(originals[place], path)
            continue
        copy = paths[place % len(originals)]
        try:
            os.link(copy, path)
        except OSError:
            path.symlink_to(copy)


def write_linked_set(root: Path, originals: Sequence[Path], num_films: int) -> List[str]:
    """Write a data set in NIH's layout, every film of another patient; return the file names."""
    names = [f"{patient:08d}_000.png" for patient in range(1, num_films + 1)]
    images = root / "images"
    images.mkdir(parents=True)
    link_films(originals, [images / name for name in names])
    rows = [
        f"{name},No Finding,0,{patient},50,F,PA,2500,2048,0.168,0.168"
        for patient, name in enumerate(names, start=1)
    ]
    (root / CSV_NAME).write_text("\n".join([CSV_HEADER, *rows]) + "\n", encoding="utf-8")
    return names
