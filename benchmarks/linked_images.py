"""Make data sets of any size from a few real images, each linked under many names."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import List, Sequence

from cxr_vit.data.synthetic.dataset import CSV_HEADER, CSV_NAME

__all__ = ["NIH", "link_images", "original_images", "write_linked_set"]

#: NIH's real files; optional, beside the repository.
NIH = Path(__file__).resolve().parents[2] / "shared" / "data" / "nih"


def original_images(folder: Path) -> List[Path]:
    """Return the PNGs of a folder; exit with status 2 if there are none."""
    images = sorted(folder.glob("*.png"))
    if not images:
        print(
            f"no images (*.png) in {folder}. Give a folder of NIH's original 1024 x 1024"
            " images with --images DIR.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return images


def link_images(originals: Sequence[Path], paths: Sequence[Path]) -> None:
    """Copy each original once, and link the remaining paths to the copies in turn.

    Existing files stay. The originals are not linked themselves, because they may be read-only or
    on another disk. Without hard links in the file system, the links are symbolic.
    """
    for index, path in enumerate(paths):
        if path.exists():
            continue
        if index < len(originals):
            shutil.copyfile(originals[index], path)
            continue
        copy = paths[index % len(originals)]
        try:
            os.link(copy, path)
        except OSError:
            path.symlink_to(copy)


def write_linked_set(root: Path, originals: Sequence[Path], num_images: int) -> List[str]:
    """Write a data set in NIH's layout, one image per patient; return the file names."""
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
