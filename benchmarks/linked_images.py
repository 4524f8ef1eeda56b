"""Data sets of any size out of a few real images: each is linked under many names."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import List, Sequence

from cxr_vit.synthetic.dataset import CSV_HEADER, CSV_NAME

__all__ = ["NIH", "link_images", "original_images", "write_linked_set"]

#: NIH's real files, which lie beside the repository on some machines.
NIH = Path(__file__).resolve().parents[2] / "shared" / "data" / "nih"


def original_images(folder: Path) -> List[Path]:
    """Return the PNGs of a folder; without any, say so and exit with status 2."""
    images = sorted(folder.glob("*.png"))
    if not images:
        print(
            f"there are no images (*.png) in {folder}. Give a folder of NIH's original 1024 x 1024"
            " images with --images DIR.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return images


def link_images(originals: Sequence[Path], paths: Sequence[Path]) -> None:
    """Put image i modulo their number at path i: one copy each, the others are hard links to it.

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


def write_linked_set(root: Path, originals: Sequence[Path], num_images: int) -> List[str]:
    """Write a data set in NIH's layout, every image of another patient; return the file names."""
    names = [f"{patient:08d}_000.png" for patient in range(1, num_images + 1)]
    images = root / "images"
    images.mkdir(parents=True)
    link_images(originals, [images / name for name in names])
    rows = [
        f"{name},No Finding,0,{patient},50,F,PA,2500,2048,0.168,0.168"
        for patient, name in enumerate(names, start=1)
    ]
    (root / CSV_NAME).write_text("\n".join([CSV_HEADER, *rows]) + "\n", encoding="utf-8")
    return names
