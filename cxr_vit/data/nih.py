"""CSVs from anywhere, read as text: what they are taken for, and what is said of it.

Imports no torch.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Optional, Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.data.labels import FINDINGS, multi_hot
from cxr_vit.data.text_files import read_text
from cxr_vit.errors import DataError, did_you_mean

__all__ = [
    "IMAGE_PIXELS",
    "RELABELS",
    "Records",
    "find_boxes",
    "find_csv",
    "find_relabels",
    "read_boxes",
    "read_records",
    "read_relabels",
    "read_table",
    "refuse_rows",
]


_FILE_NAME = re.compile(r"\S+\.(png|jpe?g)\b", re.IGNORECASE)


def read_table(path: Path, required: Sequence[str], *, key: str, example: str) -> pd.DataFrame:
    """Read a CSV as text, whatever further columns it has.

    Parameters
    ----------
    path
        UTF-8, comma-separated, with a header.
    required
        Columns that must be there, by name.
    key, example
        The configuration's key for this file and NIH's name of it, for the messages.

    Returns
    -------
    pandas.DataFrame
        All columns, as text; a field that is empty or cut off is ``""``.

    Raises
    ------
    DataError
        If it is no such table or has no rows.
    """
    text = read_text(path)
    first_line = text.lstrip().split("\n", 1)[0].strip()
    if _FILE_NAME.match(first_line):
        raise DataError(
            f"{path}: looks like a list of file names such as train_val_list.txt (it begins with"
            f" {first_line[:60]!r}); set {key} to {example} or a table like it."
        )
    try:
        with warnings.catch_warnings():
            # Rows longer than the header: NIH's bracketed columns, where someone quoted the header.
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            table = pd.read_csv(
                io.StringIO(text), dtype=str, index_col=False, keep_default_na=False
            )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{path}: not a readable CSV ({str(error).strip()}).") from error
    table.columns = table.columns.str.strip()
    absent = [column for column in required if column not in table.columns]
    if absent:
        separated = any(mark in first_line for mark in ";\t") and "," not in first_line
        raise DataError(
            f"{path}: no column {', '.join(map(repr, absent))}. Expected {example} or a table like"
            f" it, with the columns {', '.join(required)}; this file begins with"
            f" {first_line[:60]!r}."
            + (" Separate the fields with commas." if separated else f" Set {key}.")
        )
    if table.empty:
        raise DataError(f"{path}: no rows below the header. Fetch {example} again or set {key}.")
    return table


def refuse_rows(
    path: Path, wrong: np.ndarray, values: pd.Series, what: str, remedy: str = ""
) -> None:
    """Refuse a table some rows of which are wrong.

    Parameters
    ----------
    path
        The file, for the message.
    wrong
        Bool ``[rows]``.
    values
        What the rows hold, ``[rows]``; the first wrong one is shown.
    what, remedy
        What is wrong, and what is allowed or to be done.

    Raises
    ------
    DataError
        If any row is wrong; names their count and the first, counting from 1 below the header.
    """
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{path}: {what} in {int(wrong.sum())} of {len(wrong)} rows, first in row {row + 1}:"
            f" {values.iloc[row]!r}. {remedy}".rstrip()
        )


#: What Google's radiologists looked for; the order of `Records.relabels`.
RELABELS: Tuple[str, ...] = ("Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass")

#: Width and height of the images as NIH published them; boxes are measured on these.
IMAGE_PIXELS = 1024

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

#: Boxes drawn on a resized image may round over its edge.
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
        the image at 1024 x 1024, from its upper left corner.

    Raises
    ------
    DataError
        On a file of another kind, an unknown finding, or a box that is none or leaves the image.
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
    outside = (corner < -_EDGE_PIXELS) | (corner + size > IMAGE_PIXELS + _EDGE_PIXELS)
    refuse_rows(
        csv,
        outside.any(axis=1),
        given,
        "a box that leaves the image",
        f"Boxes are x, y, width, height in pixels of the {IMAGE_PIXELS} x {IMAGE_PIXELS} image.",
    )
    return boxes


def read_relabels(csv: Path) -> pd.DataFrame:
    """Read the four findings that radiologists gave some images anew (Majkowska et al., 2019).

    Parameters
    ----------
    csv
        Google's labels, a row an image, `YES` or `NO` in each column of `RELABELS`.

    Returns
    -------
    pandas.DataFrame
        float32 columns `RELABELS` of zeros and ones; the index, `image`, is the file name.

    Raises
    ------
    DataError
        On a file of another kind, an image given twice, or a value that is neither YES nor NO.
    """
    table = read_table(
        csv, ["Image Index", *RELABELS], key="data.relabels", example=_RELABEL_FILES[0]
    )
    images = table["Image Index"]
    refuse_rows(
        csv,
        images.duplicated().to_numpy(),
        images,
        "an image given before",
        "Keep one row an image.",
    )
    answers = pd.DataFrame(index=pd.Index(images, name="image"))
    for name in RELABELS:
        read = table[name].str.strip().str.upper().map({"YES": 1.0, "NO": 0.0})
        refuse_rows(
            csv,
            read.isna().to_numpy(),
            table[name],
            f"neither YES nor NO under {name!r}",
            "Write YES or NO, or leave the image's row out.",
        )
        answers[name] = read.to_numpy(dtype=np.float32)
    return answers


logger = logging.getLogger(__name__)

#: NIH's, the better labels first, and that of Kaggle's sample.
CSV_NAMES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv")

_REQUIRED = {"Image Index": "image", "Patient ID": "patient", "Finding Labels": "findings"}

#: The unquoted commas of `OriginalImage[Width,Height]` make two columns of it.
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

_OLDEST_AGE_YEARS = 120

_NIH_NAME = re.compile(r"\d{8}_\d{3}\.png")

#: Separators, drive letters, control characters, and the names of folders.
_NO_FILE_NAME = r"[/\\\x00-\x1f]|^[A-Za-z]:|^\.{0,2}$"


def _no_boxes() -> pd.DataFrame:
    sides = {side: np.empty(0, np.float64) for side in ("x", "y", "width", "height")}
    return pd.DataFrame({"row": np.empty(0, np.int64), "finding": np.empty(0, object), **sides})


def _no_relabels() -> np.ndarray:
    return np.empty((0, len(RELABELS)), dtype=np.float32)


@dataclass(frozen=True)
class Records:
    """Images and their labels, row by row.

    Attributes
    ----------
    table
        Columns `image` (file name), `patient` (int64), `findings` (text), `age` (years, float64,
        NaN where unknown), `sex` and `view` (text, empty where unknown), `follow_up` (int64, -1
        where unknown), `width` and `height` of the original image (pixels, float64, NaN where
        unknown).
    labels
        uint8 ``[len(table), classes]``, zeros and ones.
    boxes
        Columns `row` (int64, into `table`), `finding`, and `x`, `y`, `width`, `height` (float64,
        pixels of the image at 1024 x 1024); an image may have several, most have none.
    relabels
        float32 ``[len(table), 4]``, zeros and ones in the order of `RELABELS`; NaN where the image
        was not read again. All NaN if not given.
    variant
        Which of its known forms the CSV has, for people: `v2020`, `2017`, `Kaggle sample`, `other`.
    """

    table: pd.DataFrame
    labels: np.ndarray
    boxes: pd.DataFrame = field(default_factory=_no_boxes)
    relabels: np.ndarray = field(default_factory=_no_relabels)
    variant: str = "other"

    def __post_init__(self) -> None:
        if len(self.relabels) == 0:
            unread = np.full((len(self.table), len(RELABELS)), np.nan, dtype=np.float32)
            object.__setattr__(self, "relabels", unread)

    def __len__(self) -> int:
        return len(self.table)

    def take(self, rows: np.ndarray) -> Records:
        """Return the records of these rows (int64 ``[n]``), in this order."""
        rows = np.arange(len(self))[rows]  # also of a mask
        places = pd.DataFrame({"row": rows, "new_row": np.arange(len(rows))})
        boxes = places.merge(self.boxes, on="row").drop(columns="row")
        return Records(
            self.table.iloc[rows].reset_index(drop=True),
            self.labels[rows],
            boxes.rename(columns={"new_row": "row"}),
            self.relabels[rows],
            self.variant,
        )


def find_csv(root: Path, given: Optional[str]) -> Path:
    """Return the label CSV: the given one, else NIH's in `root`.

    Raises
    ------
    DataError
        If it is not there.
    """
    if not root.is_dir():
        raise DataError(
            f"data.root={root} is not a folder. Set data.root (or DATASET_DIR, the folder above"
            " chest-xray-nihcc) to the NIH files, or make a synthetic set:"
            " python -m cxr_vit sample --out data/sample"
        )
    candidates = [Path(given)] if given else [root / name for name in CSV_NAMES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        f"no label CSV: looked for {', '.join(str(path) for path in candidates)}."
        " Put NIH's Data_Entry_2017_v2020.csv there or set data.csv."
    )


def read_records(
    csv: Path,
    *,
    include_no_finding: bool,
    boxes: Optional[Path] = None,
    relabels: Optional[Path] = None,
) -> Records:
    """Read all rows of the CSV, whether or not their images are there.

    Parameters
    ----------
    csv
        NIH's CSV in its v2020 or its older form, or Kaggle's; columns are found by name.
    include_no_finding
        Whether `No Finding` is a class of its own.
    boxes, relabels
        NIH's boxes and Google's labels of 2019, if wanted; those of images that the CSV lacks are
        left out and counted in the log.

    Returns
    -------
    Records
        A row an image, in the CSV's order.

    Raises
    ------
    DataError
        On a file of another kind, a name that is a path, an image given twice, a patient that is not
        the file name's, or an unknown finding.
    """
    raw = read_table(csv, list(_REQUIRED), key="data.csv", example=CSV_NAMES[0])
    table = _images(raw, csv)
    try:
        labels = multi_hot(table["findings"].tolist(), include_no_finding=include_no_finding)
    except DataError as error:
        raise DataError(f"{csv}: {error}") from error
    return Records(
        table,
        labels,
        _no_boxes() if boxes is None else _place_boxes(boxes, table["image"], labels),
        _no_relabels() if relabels is None else _place_relabels(relabels, table["image"]),
        _variant(raw),
    )


def _variant(raw: pd.DataFrame) -> str:
    """Tell the forms of the CSV apart by their header."""
    columns = set(raw.columns)
    if {*_REQUIRED, "OriginalImageWidth", "OriginalImageHeight"} <= columns:
        return "Kaggle sample"
    if not {*_REQUIRED, "OriginalImage[Width", "Height]", "y]"} <= columns:
        return "other"
    # NIH's later files say Patient Sex; the comma at the end of the header is the older ones'.
    trailing_comma = str(raw.columns[-1]).startswith("Unnamed")
    return "2017" if trailing_comma and "Patient Gender" in columns else "v2020"


def _images(raw: pd.DataFrame, csv: Path) -> pd.DataFrame:
    known = {**_REQUIRED, **_OPTIONAL}
    table = raw[[column for column in raw.columns if column in known]].rename(columns=known)
    table = table.loc[:, ~table.columns.duplicated()].reindex(columns=_COLUMNS, fill_value="")
    _check_names(table["image"], csv)
    table["patient"] = _patients(table["patient"], table["image"], csv)
    table["age"] = _ages(table["age"])
    follow_up = _per_text(table["follow_up"], _numbers)
    table["follow_up"] = follow_up.where(follow_up >= 0, -1).astype(np.int64)
    for side in ("width", "height"):
        pixels = _per_text(table[side], _numbers)
        table[side] = pixels.where(pixels > 0)
    return table


def _per_text(texts: pd.Series, read: Callable[[pd.Series], pd.Series]) -> pd.Series:
    """Read each different text once: a column of 112,120 has a few hundred."""
    codes, different = pd.factorize(texts)
    return read(pd.Series(different)).iloc[codes].reset_index(drop=True)


def _numbers(texts: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(texts, errors="coerce").astype(np.float64)
    return numbers.where(np.isfinite(numbers))


def _check_names(names: pd.Series, csv: Path) -> None:
    refuse_rows(
        csv,
        names.str.contains(_NO_FILE_NAME, regex=True).to_numpy(dtype=bool),
        names,
        "an 'Image Index' that is a path or empty",
        "It must be a file name; images are found by name in any folder.",
    )
    refuse_rows(
        csv,
        names.duplicated().to_numpy(),
        names,
        "an 'Image Index' given before",
        "Keep one row an image.",
    )


def _patients(texts: pd.Series, names: pd.Series, csv: Path) -> pd.Series:
    """Read `1` and `00000001` as numbers, and hold them against the names of NIH's files."""
    is_number = _per_text(texts, lambda different: different.str.match(r"^[0-9]{1,18}$"))
    refuse_rows(
        csv,
        ~is_number.to_numpy(dtype=bool),
        texts,
        "a 'Patient ID' that is no whole number",
        "Give each image the number of its patient: splits are made by patient.",
    )
    patients = _per_text(texts, lambda different: different.astype(np.int64))
    named = [int(name[:8]) if _NIH_NAME.fullmatch(name) else -1 for name in names]
    refuse_rows(
        csv,
        (np.array(named) >= 0) & (np.array(named) != patients.to_numpy()),
        names + " of patient " + texts,
        "a 'Patient ID' that is not the first eight digits of the file name",
        "The columns or rows are mixed up; fetch the CSV again.",
    )
    return patients


def _ages(texts: pd.Series) -> pd.Series:
    """Read `58`, `058Y`, `011M` and `005D` as years; impossible ages become NaN, counted."""

    def read(different: pd.Series) -> pd.Series:
        parts = different.str.extract(r"^(\d+(?:\.\d+)?)([YMD]?)$")
        units = parts[1].map({"Y": 1.0, "": 1.0, "M": 12.0, "D": 365.25})
        return pd.to_numeric(parts[0], errors="coerce").astype(np.float64) / units

    years = _per_text(texts, read)
    impossible = years > _OLDEST_AGE_YEARS
    if impossible.any():
        logger.warning(
            "%d ages over %d years count as unknown", impossible.sum(), _OLDEST_AGE_YEARS
        )
    return years.where(~impossible)


def _place_boxes(csv: Path, images: pd.Series, labels: np.ndarray) -> pd.DataFrame:
    """Give each box the row of its image."""
    boxes = read_boxes(csv)
    boxes.insert(0, "row", pd.Index(images).get_indexer(boxes["image"]).astype(np.int64))
    ours = boxes[boxes["row"] >= 0].drop(columns="image").reset_index(drop=True)
    _report_lacking(csv, "boxes", len(boxes) - len(ours), len(boxes))
    columns = ours["finding"].map({name: column for column, name in enumerate(FINDINGS)})
    unlabelled = labels[ours["row"], columns.to_numpy(dtype=np.int64)] == 0
    if unlabelled.any():
        logger.warning(
            "%s: %d boxes are of a finding that their image is not labelled with; they are kept",
            csv,
            unlabelled.sum(),
        )
    return ours


def _place_relabels(csv: Path, images: pd.Series) -> np.ndarray:
    """Give each image its second reading, or NaN."""
    answers = read_relabels(csv)
    relabels: np.ndarray = answers.reindex(images).to_numpy(dtype=np.float32)
    _report_lacking(csv, "labels", int((~answers.index.isin(images)).sum()), len(answers))
    return relabels


def _report_lacking(csv: Path, what: str, lacking: int, total: int) -> None:
    if lacking:
        logger.info(
            "%s: %d of %d %s are of images that the CSV lacks, and left out",
            csv,
            lacking,
            total,
            what,
        )
