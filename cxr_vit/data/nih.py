"""The label CSV of ChestX-ray14, NIH's boxes and Google's labels of 2019.

All three are read as text first: copies differ in columns, spelling and formatting.
"""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Container, Iterator, Optional

import numpy as np
import pandas as pd

from cxr_vit.data.labels import FINDINGS, multi_hot
from cxr_vit.data.records import BOX_SIDES, RELABELS, Records
from cxr_vit.data.table_files import per_text, read_ages, read_table, refuse_rows, to_numbers
from cxr_vit.data.text_files import CSV_FILES
from cxr_vit.errors import DataError, did_you_mean
from cxr_vit.files import find_file

logger = logging.getLogger(__name__)

#: Width and height of the images as NIH published them; boxes are in pixels of these.
IMAGE_PIXELS = 1024

#: NIH's and that of the copy at 224 pixels.
BOX_FILES = ("BBox_List_2017.csv", "BBox_List_2017_Official_NIH.csv")

#: In place of a path: do not read the file in the root.
NONE = "none"

_RELABEL_FILES = ("google2019_nih-chest-xray-labels.csv",)

_REQUIRED = {"Image Index": "image", "Patient ID": "patient", "Finding Labels": "findings"}

#: The unquoted commas of `OriginalImage[Width,Height]` split it into two columns.
_OPTIONAL = {
    "Patient Age": "age",
    "Patient Gender": "sex",
    "Patient Sex": "sex",
    "View Position": "view",
    "Follow-up #": "follow_up",
    "OriginalImage[Width": "width",
    "OriginalImageWidth": "width",
    "OriginalImage_Width": "width",
    "Height]": "height",
    "OriginalImageHeight": "height",
    "OriginalImage_Height": "height",
}

_COLUMNS = (*_REQUIRED.values(), *dict.fromkeys(_OPTIONAL.values()))

_BOX_COLUMNS = {
    "Image Index": "image",
    "Finding Label": "finding",
    "Bbox [x": "x",
    "y": "y",
    "w": "width",
    "h]": "height",
}

#: Boxes drawn on a resized image may round over its edge.
_EDGE_PIXELS = 1.0

_NIH_NAME = re.compile(r"\d{8}_\d{3}\.png")

#: Separators, drive letters, control characters, and the names of folders.
_NO_FILE_NAME = r"[/\\\x00-\x1f]|^[A-Za-z]:|^\.{0,2}$"


def find_boxes(root: Path, given: Optional[str] = None) -> Optional[Path]:
    """Return the file of boxes: the given file, else NIH's in `root`; None if `given` is none."""
    return None if given == NONE else find_file(root, given, BOX_FILES, key="data.boxes")


def find_relabels(root: Path, given: Optional[str] = None) -> Optional[Path]:
    """Return Google's labels of 2019, found as the boxes are."""
    return None if given == NONE else find_file(root, given, _RELABEL_FILES, key="data.relabels")


def read_records(
    csv: Path,
    *,
    include_no_finding: bool,
    boxes: Optional[Path] = None,
    relabels: Optional[Path] = None,
    optional: Container[str] = (),
) -> Records:
    """Read all rows of the CSV, whether or not their images exist.

    `csv` is NIH's in its v2020 or older form, or Kaggle's; columns are found by name. Entries of
    `boxes` and `relabels` for images that the CSV lacks are left out and counted in the log. Either
    one that is unreadable is left out with a warning if `optional` contains its parameter's name.

    Raises DataError if the file is not such a table, an image name is a path or repeated, a patient
    differs from the one in the file name, or a finding is unknown.
    """
    raw = read_table(csv, list(_REQUIRED), key="data.csv", example=CSV_FILES[0])
    table = _read_images(raw, csv)
    try:
        labels = multi_hot(table["findings"].tolist(), include_no_finding=include_no_finding)
    except DataError as error:
        raise DataError(f"{csv}: {error}") from error
    records = Records(table, labels, variant=_variant(raw))
    if boxes is not None:
        with _tolerating("boxes", optional):
            records = replace(records, boxes=_boxes_by_row(boxes, table["image"], labels))
    if relabels is not None:
        with _tolerating("relabels", optional):
            records = replace(records, relabels=_relabels_by_row(relabels, table["image"]))
    return records


@contextlib.contextmanager
def _tolerating(key: str, optional: Container[str]) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        if key not in optional:
            raise
        text = "%s Training does not need it: it is left out, and data.%s=%s does not look for it."
        logger.warning(text, error, key, NONE)


def _variant(raw: pd.DataFrame) -> str:
    """Identify the form of the CSV by its header."""
    columns = set(raw.columns)
    if {*_REQUIRED, "OriginalImageWidth", "OriginalImageHeight"} <= columns:
        return "Kaggle sample"
    if not {*_REQUIRED, "OriginalImage[Width", "Height]", "y]"} <= columns:
        return "other"
    # NIH's later files say Patient Sex; only the older ones have a comma at the header's end.
    trailing_comma = str(raw.columns[-1]).startswith("Unnamed")
    return "2017" if trailing_comma and "Patient Gender" in columns else "v2020"


def _read_images(raw: pd.DataFrame, csv: Path) -> pd.DataFrame:
    known = {**_REQUIRED, **_OPTIONAL}
    table = raw[[column for column in raw.columns if column in known]].rename(columns=known)
    table = table.loc[:, ~table.columns.duplicated()].reindex(columns=_COLUMNS, fill_value="")
    names = table["image"] = table["image"].str.strip()
    invalid = names.str.contains(_NO_FILE_NAME, regex=True).to_numpy(dtype=bool)
    hint = "It must be a file name; images are found by name in any folder."
    refuse_rows(csv, invalid, names, "an 'Image Index' that is a path or empty", hint)
    repeated = names.duplicated().to_numpy()
    refuse_rows(csv, repeated, names, "a repeated 'Image Index'", "Keep one row per image.")
    table["patient"] = _read_patients(table["patient"], names, csv)
    table["age"] = read_ages(table["age"])
    follow_up = per_text(table["follow_up"], to_numbers)
    table["follow_up"] = follow_up.where(follow_up >= 0, -1).astype(np.int64)
    for side in ("width", "height"):
        pixels = per_text(table[side], to_numbers)
        table[side] = pixels.where(pixels > 0)
    return table


def _read_patients(texts: pd.Series, names: pd.Series, csv: Path) -> pd.Series:
    """Read `1` and `00000001` as numbers, and compare them with the names of NIH's files."""
    is_number = per_text(texts, lambda distinct: distinct.str.match(r"^[0-9]{1,18}$"))
    what = "a 'Patient ID' that is not a whole number"
    hint = "Give the number of each image's patient: splits are made by patient."
    refuse_rows(csv, ~is_number.to_numpy(dtype=bool), texts, what, hint)
    patients = per_text(texts, lambda distinct: distinct.astype(np.int64))
    named = np.array([int(name[:8]) if _NIH_NAME.fullmatch(name) else -1 for name in names])
    wrong = (named >= 0) & (named != patients.to_numpy())
    what = "a 'Patient ID' that differs from the first eight digits of the file name"
    hint = "The columns or rows are mixed up; fetch the CSV again."
    refuse_rows(csv, wrong, names + " of patient " + texts, what, hint)
    return patients


def _boxes_by_row(csv: Path, images: pd.Series, labels: np.ndarray) -> pd.DataFrame:
    boxes = read_boxes(csv)
    boxes.insert(0, "row", pd.Index(images).get_indexer(boxes["image"]).astype(np.int64))
    kept = boxes[boxes["row"] >= 0].drop(columns="image").reset_index(drop=True)
    _log_lacking(csv, "boxes", len(boxes) - len(kept), len(boxes))
    columns = kept["finding"].map({name: column for column, name in enumerate(FINDINGS)})
    unlabelled = labels[kept["row"], columns.to_numpy(dtype=np.int64)] == 0
    if unlabelled.any():
        text = "%s: %d boxes have a finding that is not among their image's labels; they are kept"
        logger.warning(text, csv, unlabelled.sum())
    return kept


def _relabels_by_row(csv: Path, images: pd.Series) -> np.ndarray:
    answers = read_relabels(csv)
    relabels: np.ndarray = answers.reindex(images).to_numpy(dtype=np.float32)
    _log_lacking(csv, "labels", int((~answers.index.isin(images)).sum()), len(answers))
    return relabels


def _log_lacking(csv: Path, what: str, lacking: int, total: int) -> None:
    if lacking:
        text = "%s: left out %d of %d %s, of images that the CSV lacks"
        logger.info(text, csv, lacking, total, what)


def read_boxes(csv: Path) -> pd.DataFrame:
    """Read the boxes that NIH's radiologists drew around findings.

    Returns columns `image` (file name), `finding`, and `x`, `y`, `width`, `height`: float64, pixels
    of the image at 1024 x 1024, from its upper left corner. Empty columns are ignored; NIH's
    `Infiltrate` becomes the CSV's `Infiltration`.

    Raises DataError on another kind of file, an unknown finding, or a box that is not four numbers,
    has no extent or leaves the image.
    """
    table = read_table(csv, list(_BOX_COLUMNS), key="data.boxes", example=BOX_FILES[0])
    boxes = table[list(_BOX_COLUMNS)].rename(columns=_BOX_COLUMNS)
    boxes["image"] = boxes["image"].str.strip()
    boxes["finding"] = boxes["finding"].replace({"Infiltrate": "Infiltration"})
    unknown = ~boxes["finding"].isin(FINDINGS).to_numpy(dtype=bool)
    near = did_you_mean(str(boxes["finding"].iloc[int(np.argmax(unknown))]), FINDINGS)
    hint = f"Did you mean {near!r}?" if near else f"Known findings: {', '.join(FINDINGS)}."
    refuse_rows(csv, unknown, boxes["finding"], "an unknown finding", hint)
    given = boxes["x"].str.cat(boxes[BOX_SIDES[1:]], sep=", ")
    boxes[BOX_SIDES] = boxes[BOX_SIDES].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    numbers = boxes[BOX_SIDES].to_numpy()
    corner, size = numbers[:, :2], numbers[:, 2:]
    hint = "A box is x, y, width, height."
    invalid = ~np.isfinite(numbers)
    refuse_rows(csv, invalid.any(axis=1), given, "a box that is not four numbers", hint)
    hint = "Width and height must be positive."
    refuse_rows(csv, (size <= 0).any(axis=1), given, "a box without extent", hint)
    outside = (corner < -_EDGE_PIXELS) | (corner + size > IMAGE_PIXELS + _EDGE_PIXELS)
    hint = f"Boxes are x, y, width, height in pixels of the {IMAGE_PIXELS} x {IMAGE_PIXELS} image."
    refuse_rows(csv, outside.any(axis=1), given, "a box that leaves the image", hint)
    return boxes


def read_relabels(csv: Path) -> pd.DataFrame:
    """Read Google's labels of four findings (Majkowska et al., 2020), `YES` or `NO` per column.

    Returns float32 columns `RELABELS` of zeros and ones; the index, `image`, is the file name.

    Raises DataError on another kind of file, a repeated image, or a value other than YES and NO.
    """
    columns = ["Image Index", *RELABELS]
    table = read_table(csv, columns, key="data.relabels", example=_RELABEL_FILES[0])
    images = table["Image Index"].str.strip()
    repeated = images.duplicated().to_numpy()
    refuse_rows(csv, repeated, images, "a repeated image", "Keep one row per image.")
    answers = pd.DataFrame(index=pd.Index(images, name="image"))
    for name in RELABELS:
        read = table[name].str.strip().str.upper().map({"YES": 1.0, "NO": 0.0})
        hint = "Write YES or NO, or leave the image's row out."
        wrong = read.isna().to_numpy()
        refuse_rows(csv, wrong, table[name], f"neither YES nor NO under {name!r}", hint)
        answers[name] = read.to_numpy(dtype=np.float32)
    return answers
