"""NIH's boxes and Google's second reading, beside the label CSV. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.tables import read_table, refuse_rows
from cxr_vit.errors import DataError, did_you_mean

__all__ = [
    "FILM_PIXELS",
    "RELABELS",
    "find_boxes",
    "find_relabels",
    "read_boxes",
    "read_relabels",
]

#: What Google's radiologists looked for; the order of `Records.relabels`.
RELABELS: Tuple[str, ...] = ("Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass")
#: Width and height of the films as NIH published them; boxes are measured on these.
FILM_PIXELS = 1024

#: NIH's spelling and that of the copy at 224 pixels.
_BOX_FILES = ("BBox_List_2017.csv", "BBox_List_2017_Official_NIH.csv")
_RELABEL_FILES = ("google2019_nih-chest-xray-labels.csv",)
_BOX_COLUMNS = {
    "Image Index": "image",
    "Finding Label": "finding",
    "Bbox [x": "x",
    "y": "y",
    "w": "width",
    "h]": "height",
}
_SPELLINGS = {"Infiltrate": "Infiltration"}
#: Boxes drawn on a resized film may round over its edge.
_EDGE_PIXELS = 1.0


def find_boxes(root: Path, given: Optional[str] = None) -> Optional[Path]:
    """Return the file of boxes: the given one, else NIH's in `root`, else None.

    Raises
    ------
    DataError
        If the given one is not there.
    """
    return _find(root, given, _BOX_FILES, "data.boxes")


def find_relabels(root: Path, given: Optional[str] = None) -> Optional[Path]:
    """Return Google's labels of 2019: the given file, else the one in `root`, else None.

    Raises
    ------
    DataError
        If the given one is not there.
    """
    return _find(root, given, _RELABEL_FILES, "data.relabels")


def _find(root: Path, given: Optional[str], names: Sequence[str], key: str) -> Optional[Path]:
    if given is not None:
        if not Path(given).is_file():
            raise DataError(f"{key}={given}: no such file. Correct {key} or leave it out.")
        return Path(given)
    return next((root / name for name in names if (root / name).is_file()), None)


def read_boxes(csv: Path) -> pd.DataFrame:
    """Read the boxes that NIH's radiologists drew around findings.

    Parameters
    ----------
    csv
        NIH's `BBox_List_2017.csv`; its empty columns are passed over, its `Infiltrate` is the
        CSV's `Infiltration`.

    Returns
    -------
    pandas.DataFrame
        Columns `image` (file name), `finding`, and `x`, `y`, `width`, `height`: float64, pixels of
        the film at 1024 x 1024, from its upper left corner.

    Raises
    ------
    DataError
        On a file of another kind, an unknown finding, or a box that is none or leaves the film.
    """
    table = read_table(csv, list(_BOX_COLUMNS), key="data.boxes", example=_BOX_FILES[0])
    boxes = table[list(_BOX_COLUMNS)].rename(columns=_BOX_COLUMNS)
    boxes["finding"] = boxes["finding"].replace(_SPELLINGS)
    unknown = ~boxes["finding"].isin(FINDINGS).to_numpy(dtype=bool)
    near = did_you_mean(str(boxes["finding"].iloc[int(np.argmax(unknown))]), FINDINGS)
    refuse_rows(
        csv,
        unknown,
        boxes["finding"],
        "an unknown finding",
        f"Did you mean {near!r}?" if near else f"Known findings: {', '.join(FINDINGS)}.",
    )
    sides = ["x", "y", "width", "height"]
    given = boxes[sides].agg(", ".join, axis=1)
    boxes[sides] = boxes[sides].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    numbers = boxes[sides].to_numpy()
    corner, size = numbers[:, :2], numbers[:, 2:]
    refuse_rows(
        csv,
        ~np.isfinite(numbers).all(axis=1),
        given,
        "a box that is not four numbers",
        "A box is x, y, width, height.",
    )
    refuse_rows(
        csv,
        (size <= 0).any(axis=1),
        given,
        "a box without extent",
        "Width and height must be positive.",
    )
    outside = (corner < -_EDGE_PIXELS) | (corner + size > FILM_PIXELS + _EDGE_PIXELS)
    refuse_rows(
        csv,
        outside.any(axis=1),
        given,
        "a box that leaves the film",
        f"Boxes are x, y, width, height in pixels of the {FILM_PIXELS} x {FILM_PIXELS} film.",
    )
    return boxes


def read_relabels(csv: Path) -> pd.DataFrame:
    """Read the four findings that radiologists gave some films anew (Majkowska et al., 2019).

    Parameters
    ----------
    csv
        Google's labels, a row a film, `YES` or `NO` in each column of `RELABELS`.

    Returns
    -------
    pandas.DataFrame
        float32 columns `RELABELS` of zeros and ones; the index, `image`, is the file name.

    Raises
    ------
    DataError
        On a file of another kind, a film given twice, or a value that is neither YES nor NO.
    """
    table = read_table(
        csv, ["Image Index", *RELABELS], key="data.relabels", example=_RELABEL_FILES[0]
    )
    images = table["Image Index"]
    refuse_rows(
        csv, images.duplicated().to_numpy(), images, "a film given before", "Keep one row a film."
    )
    answers = pd.DataFrame(index=pd.Index(images, name="image"))
    for name in RELABELS:
        read = table[name].str.strip().str.upper().map({"YES": 1.0, "NO": 0.0})
        refuse_rows(
            csv,
            read.isna().to_numpy(),
            table[name],
            f"neither YES nor NO under {name!r}",
            "Write YES or NO, or leave the film's row out.",
        )
        answers[name] = read.to_numpy(dtype=np.float32)
    return answers
