"""The label CSV of ChestX-ray14, NIH's boxes and Google's labels of 2019.

All three are read as text first: copies differ in columns, spelling and formatting.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Optional, Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.data.labels import FINDINGS, multi_hot
from cxr_vit.data.text_files import CSV_FILES, read_text
from cxr_vit.data.text_files import find_csv as find_csv
from cxr_vit.errors import DataError, did_you_mean
from cxr_vit.files import find_file

logger = logging.getLogger(__name__)

#: Findings labelled again by Google's radiologists; the order of `Records.relabels`.
RELABELS: Tuple[str, ...] = ("Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass")

#: Width and height of the images as NIH published them; boxes are in pixels of these.
IMAGE_PIXELS = 1024

#: NIH's and that of the copy at 224 pixels.
_BOX_FILES = ("BBox_List_2017.csv", "BBox_List_2017_Official_NIH.csv")

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

_SIDES = ["x", "y", "width", "height"]

#: Boxes drawn on a resized image may round over its edge.
_EDGE_PIXELS = 1.0

_OLDEST_AGE_YEARS = 120

#: Characters of a wrong value that messages quote.
_SHOWN = 100

#: NIH's CSV has 12, each of which is read as an array.
_MAX_COLUMNS = 1000

_NIH_NAME = re.compile(r"\d{8}_\d{3}\.png")

#: Separators, drive letters, control characters, and the names of folders.
_NO_FILE_NAME = r"[/\\\x00-\x1f]|^[A-Za-z]:|^\.{0,2}$"

_LIST_LINE = re.compile(r"\S+\.(png|jpe?g)\b", re.IGNORECASE)


def find_boxes(root: Path, given: Optional[str] = None) -> Optional[Path]:
    """Return the file of boxes: the given file, else NIH's in `root`, else None."""
    return find_file(root, given, _BOX_FILES, key="data.boxes")


def find_relabels(root: Path, given: Optional[str] = None) -> Optional[Path]:
    """Return Google's labels of 2019: the given file, else the one in `root`, else None."""
    return find_file(root, given, _RELABEL_FILES, key="data.relabels")


def _no_boxes() -> pd.DataFrame:
    sides = {side: np.empty(0, np.float64) for side in _SIDES}
    return pd.DataFrame({"row": np.empty(0, np.int64), "finding": np.empty(0, object), **sides})


@dataclass(frozen=True)
class Records:
    """Images and their labels, row by row.

    Attributes
    ----------
    table
        Columns `image` (file name), `patient` (int64), `findings` (text), `age` (years, float64,
        NaN if unknown), `sex` and `view` (text, empty if unknown), `follow_up` (int64, -1 if
        unknown), `width` and `height` of the original image (pixels, float64, NaN if unknown).
    labels
        uint8 ``[len(table), classes]``, zeros and ones.
    boxes
        Columns `row` (int64, into `table`), `finding`, and `x`, `y`, `width`, `height` (float64,
        pixels of the image at 1024 x 1024). An image may have several; most have none.
    relabels
        float32 ``[len(table), 4]``, zeros and ones in the order of `RELABELS`; NaN for images
        without second labels.
    variant
        Known form of the CSV: `v2020`, `2017`, `Kaggle sample` or `other`.
    """

    table: pd.DataFrame
    labels: np.ndarray
    boxes: pd.DataFrame = field(default_factory=_no_boxes)
    relabels: np.ndarray = field(default_factory=lambda: np.empty((0, len(RELABELS)), np.float32))
    variant: str = "other"

    def __post_init__(self) -> None:
        if len(self.relabels) == 0:
            unread = np.full((len(self.table), len(RELABELS)), np.nan, dtype=np.float32)
            object.__setattr__(self, "relabels", unread)

    def __len__(self) -> int:
        return len(self.table)

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
        )


def read_records(
    csv: Path,
    *,
    include_no_finding: bool,
    boxes: Optional[Path] = None,
    relabels: Optional[Path] = None,
) -> Records:
    """Read all rows of the CSV, whether or not their images exist.

    `csv` is NIH's in its v2020 or older form, or Kaggle's; columns are found by name. Entries of
    `boxes` and `relabels` for images that the CSV lacks are left out and counted in the log.

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
        records = replace(records, boxes=_boxes_by_row(boxes, table["image"], labels))
    if relabels is not None:
        records = replace(records, relabels=_relabels_by_row(relabels, table["image"]))
    return records


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
    names = table["image"]
    invalid = names.str.contains(_NO_FILE_NAME, regex=True).to_numpy(dtype=bool)
    hint = "It must be a file name; images are found by name in any folder."
    _refuse_rows(csv, invalid, names, "an 'Image Index' that is a path or empty", hint)
    repeated = names.duplicated().to_numpy()
    _refuse_rows(csv, repeated, names, "a repeated 'Image Index'", "Keep one row per image.")
    table["patient"] = _read_patients(table["patient"], names, csv)
    table["age"] = _read_ages(table["age"])
    follow_up = _per_text(table["follow_up"], _numbers)
    table["follow_up"] = follow_up.where(follow_up >= 0, -1).astype(np.int64)
    for side in ("width", "height"):
        pixels = _per_text(table[side], _numbers)
        table[side] = pixels.where(pixels > 0)
    return table


def _read_patients(texts: pd.Series, names: pd.Series, csv: Path) -> pd.Series:
    """Read `1` and `00000001` as numbers, and compare them with the names of NIH's files."""
    is_number = _per_text(texts, lambda distinct: distinct.str.match(r"^[0-9]{1,18}$"))
    what = "a 'Patient ID' that is not a whole number"
    hint = "Give the number of each image's patient: splits are made by patient."
    _refuse_rows(csv, ~is_number.to_numpy(dtype=bool), texts, what, hint)
    patients = _per_text(texts, lambda distinct: distinct.astype(np.int64))
    named = np.array([int(name[:8]) if _NIH_NAME.fullmatch(name) else -1 for name in names])
    wrong = (named >= 0) & (named != patients.to_numpy())
    what = "a 'Patient ID' that differs from the first eight digits of the file name"
    hint = "The columns or rows are mixed up; fetch the CSV again."
    _refuse_rows(csv, wrong, names + " of patient " + texts, what, hint)
    return patients


def _read_ages(texts: pd.Series) -> pd.Series:
    """Read `58`, `058Y`, `011M` and `005D` as years; impossible ages become NaN."""

    def read(distinct: pd.Series) -> pd.Series:
        parts = distinct.str.extract(r"^(\d+(?:\.\d+)?)([YMD]?)$")
        units = parts[1].map({"Y": 1.0, "": 1.0, "M": 12.0, "D": 365.25})
        return pd.to_numeric(parts[0], errors="coerce").astype(np.float64) / units

    years = _per_text(texts, read)
    impossible = years > _OLDEST_AGE_YEARS
    if impossible.any():
        text = "%d ages over %d years count as unknown"
        logger.warning(text, impossible.sum(), _OLDEST_AGE_YEARS)
    return years.where(~impossible)


def _numbers(texts: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(texts, errors="coerce").astype(np.float64)
    return numbers.where(np.isfinite(numbers))


def _per_text(texts: pd.Series, read: Callable[[pd.Series], pd.Series]) -> pd.Series:
    """Apply `read` once per distinct text: 112,120 rows have a few hundred."""
    codes, distinct = pd.factorize(texts)
    return read(pd.Series(distinct)).iloc[codes].reset_index(drop=True)


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
    table = read_table(csv, list(_BOX_COLUMNS), key="data.boxes", example=_BOX_FILES[0])
    boxes = table[list(_BOX_COLUMNS)].rename(columns=_BOX_COLUMNS)
    boxes["finding"] = boxes["finding"].replace({"Infiltrate": "Infiltration"})
    unknown = ~boxes["finding"].isin(FINDINGS).to_numpy(dtype=bool)
    near = did_you_mean(str(boxes["finding"].iloc[int(np.argmax(unknown))]), FINDINGS)
    hint = f"Did you mean {near!r}?" if near else f"Known findings: {', '.join(FINDINGS)}."
    _refuse_rows(csv, unknown, boxes["finding"], "an unknown finding", hint)
    given = boxes["x"].str.cat(boxes[_SIDES[1:]], sep=", ")
    boxes[_SIDES] = boxes[_SIDES].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    numbers = boxes[_SIDES].to_numpy()
    corner, size = numbers[:, :2], numbers[:, 2:]
    hint = "A box is x, y, width, height."
    invalid = ~np.isfinite(numbers)
    _refuse_rows(csv, invalid.any(axis=1), given, "a box that is not four numbers", hint)
    hint = "Width and height must be positive."
    _refuse_rows(csv, (size <= 0).any(axis=1), given, "a box without extent", hint)
    outside = (corner < -_EDGE_PIXELS) | (corner + size > IMAGE_PIXELS + _EDGE_PIXELS)
    hint = f"Boxes are x, y, width, height in pixels of the {IMAGE_PIXELS} x {IMAGE_PIXELS} image."
    _refuse_rows(csv, outside.any(axis=1), given, "a box that leaves the image", hint)
    return boxes


def read_relabels(csv: Path) -> pd.DataFrame:
    """Read Google's labels of four findings (Majkowska et al., 2019), `YES` or `NO` per column.

    Returns float32 columns `RELABELS` of zeros and ones; the index, `image`, is the file name.

    Raises DataError on another kind of file, a repeated image, or a value other than YES and NO.
    """
    columns = ["Image Index", *RELABELS]
    table = read_table(csv, columns, key="data.relabels", example=_RELABEL_FILES[0])
    images = table["Image Index"]
    repeated = images.duplicated().to_numpy()
    _refuse_rows(csv, repeated, images, "a repeated image", "Keep one row per image.")
    answers = pd.DataFrame(index=pd.Index(images, name="image"))
    for name in RELABELS:
        read = table[name].str.strip().str.upper().map({"YES": 1.0, "NO": 0.0})
        hint = "Write YES or NO, or leave the image's row out."
        wrong = read.isna().to_numpy()
        _refuse_rows(csv, wrong, table[name], f"neither YES nor NO under {name!r}", hint)
        answers[name] = read.to_numpy(dtype=np.float32)
    return answers


def read_table(path: Path, required: Sequence[str], *, key: str, example: str) -> pd.DataFrame:
    """Read a comma-separated UTF-8 file with a header; return all columns as text.

    An empty or missing field is ``""``. `key` and `example` are the file's configuration key and
    NIH's name for it, for messages.

    Raises DataError if it is not such a table, lacks a required column, or has no rows.
    """
    text = read_text(path)
    first_line = text.lstrip().split("\n", 1)[0].strip()
    if _LIST_LINE.match(first_line):
        raise DataError(
            f"{path}: looks like a list of file names such as train_val_list.txt (it begins with"
            f" {first_line[:60]!r}); set {key} to {example} or a table like it."
        )
    if first_line.count(",") > _MAX_COLUMNS:
        raise DataError(f"{path}: more than {_MAX_COLUMNS} columns. Set {key} to {example}.")
    try:
        with warnings.catch_warnings():
            # Rows longer than the header: NIH's bracketed columns in copies with a quoted header.
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            source = io.StringIO(text)
            table = pd.read_csv(source, dtype=str, index_col=False, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{path}: not a readable CSV ({str(error).strip()}).") from error
    table.columns = table.columns.str.strip()
    absent = [column for column in required if column not in table.columns]
    if absent:
        separated = any(mark in first_line for mark in ";\t") and "," not in first_line
        advice = "Separate the fields with commas" if separated else f"Set {key}"
        raise DataError(
            f"{path}: no column {', '.join(map(repr, absent))}. Expected {example} or a table like"
            f" it, with the columns {', '.join(required)}; this file begins with"
            f" {first_line[:60]!r}. {advice}."
        )
    if table.empty:
        raise DataError(f"{path}: no rows below the header. Fetch {example} again or set {key}.")
    return table


def _refuse_rows(path: Path, wrong: np.ndarray, values: pd.Series, what: str, remedy: str) -> None:
    """Raise DataError if any row is wrong (bool ``[rows]``), with their number and the first.

    Rows are counted from 1 below the header; `values` is what the rows hold.
    """
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{path}: {what} in {int(wrong.sum())} of {len(wrong)} rows, first in row {row + 1}:"
            f" {str(values.iloc[row])[:_SHOWN]!r}. {remedy}"
        )
