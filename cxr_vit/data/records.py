"""Records: the images of a data set and their labels, whatever file they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import numpy as np
import pandas as pd

#: Findings labelled again by Google's radiologists; the order of `Records.relabels`.
RELABELS: Tuple[str, ...] = ("Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass")
#: NIH's findings that are one of these; it has none for fractures. Material in the airspaces is
#: called by any of the four names in NIH's reports.
NIH_FINDINGS: Dict[str, Tuple[str, ...]] = {
    "Pneumothorax": ("Pneumothorax",),
    "Airspace opacity": ("Consolidation", "Infiltration", "Pneumonia", "Edema"),
    "Nodule or mass": ("Nodule", "Mass"),
}

#: Columns of `Records.boxes`.
BOX_SIDES = ["x", "y", "width", "height"]

#: In `Records.labels` and the labels of a batch: whether the image has the finding is not known.
UNKNOWN = -1


def _no_boxes() -> pd.DataFrame:
    sides = {side: np.empty(0, np.float64) for side in BOX_SIDES}
    return pd.DataFrame({"row": np.empty(0, np.int64), "finding": np.empty(0, object), **sides})


@dataclass(frozen=True)
class Records:
    """Images and their labels, row by row.

    Attributes
    ----------
    table
        Columns `image` (file name, or path as the table has it), `patient` (int64 or text), `age`
        (years, float64, NaN if unknown), `sex` and `view` (text, empty if unknown); of NIH's CSV
        also `findings` (text), `follow_up` (int64, -1 if unknown), `width` and `height` of the
        original image (pixels, float64, NaN if unknown); of a table also `source` (text, empty if
        unknown).
    labels
        int8 ``[len(table), classes]``: 0, 1 or `UNKNOWN`.
    boxes
        Columns `row` (int64, into `table`), `finding`, and `x`, `y`, `width`, `height` (float64,
        pixels of the image at 1024 x 1024). An image may have several; most have none.
    relabels
        float32 ``[len(table), 4]``, zeros and ones in the order of `RELABELS`; NaN for images
        without second labels.
    variant
        Known form of NIH's CSV: `v2020`, `2017`, `Kaggle sample` or `other`; `table` otherwise.
    given_split
        Split that the table itself gives each image (`train`, `val`, `test`, or empty for none),
        or None if it gives none.
    """

    table: pd.DataFrame
    labels: np.ndarray
    boxes: pd.DataFrame = field(default_factory=_no_boxes)
    relabels: np.ndarray = field(default_factory=lambda: np.empty((0, len(RELABELS)), np.float32))
    variant: str = "other"
    given_split: Optional[np.ndarray] = None

    def __post_init__(self) -> None:
        if len(self.relabels) == 0:
            unread = np.full((len(self.table), len(RELABELS)), np.nan, dtype=np.float32)
            object.__setattr__(self, "relabels", unread)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def without_finding(self) -> str:
        """What to call an image whose labels are all 0: a table may have few of the findings."""
        return "none of the labels" if self.variant == "table" else "No Finding"

    def take(self, rows: np.ndarray) -> Records:
        """Return the records of these rows, int64 ``[n]`` or a mask, in this order."""
        rows = np.arange(len(self))[rows]
        moves = pd.DataFrame({"old_row": rows, "row": np.arange(len(rows))})
        boxes = moves.merge(self.boxes.rename(columns={"row": "old_row"}), on="old_row")
        return Records(
            self.table.iloc[rows].reset_index(drop=True),
            self.labels[rows],
            boxes.drop(columns="old_row"),
            self.relabels[rows],
            self.variant,
            None if self.given_split is None else self.given_split[rows],
        )
