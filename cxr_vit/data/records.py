"""The NIH CSV, with its boxes and relabels -> records, one a film. Imports no torch."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import pandas as pd

from cxr_vit.data.annotations import RELABELS, read_boxes, read_relabels
from cxr_vit.data.labels import FINDINGS, multi_hot
from cxr_vit.data.tables import read_table, refuse_rows
from cxr_vit.errors import DataError

__all__ = ["RELABELS", "Records", "find_csv", "read_records"]

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
    """Films and their labels, row by row.

    Attributes
    ----------
    table
        Columns `image` (file name), `patient` (int64), `findings` (text), `age` (years, float64,
        NaN where unknown), `sex` and `view` (text, empty where unknown), `follow_up` (int64, -1
        where unknown), `width` and `height` of the original film (pixels, float64, NaN where
        unknown).
    labels
        uint8 ``[len(table), classes]``, zeros and ones.
    boxes
        Columns `row` (int64, into `table`), `finding`, and `x`, `y`, `width`, `height` (float64,
        pixels of the film at 1024 x 1024); a film may have several, most have none.
    relabels
        float32 ``[len(table), 4]``, zeros and ones in the order of `RELABELS`; NaN where the film
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
        NIH's boxes and Google's labels of 2019, if wanted; those of films that the CSV lacks are
        left out and counted in the log.

    Returns
    -------
    Records
        A row a film, in the CSV's order.

    Raises
    ------
    DataError
        On a file of another kind, a name that is a path, a film given twice, a patient that is not
        the file name's, or an unknown finding.
    """
    raw = read_table(csv, list(_REQUIRED), key="data.csv", example=CSV_NAMES[0])
    table = _films(raw, csv)
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


def _films(raw: pd.DataFrame, csv: Path) -> pd.DataFrame:
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
        "Keep one row a film.",
    )


def _patients(texts: pd.Series, names: pd.Series, csv: Path) -> pd.Series:
    """Read `1` and `00000001` as numbers, and hold them against the names of NIH's files."""
    is_number = _per_text(texts, lambda different: different.str.match(r"^[0-9]{1,18}$"))
    refuse_rows(
        csv,
        ~is_number.to_numpy(dtype=bool),
        texts,
        "a 'Patient ID' that is no whole number",
        "Give each film the number of its patient: splits are made by patient.",
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
    """Give each box the row of its film."""
    boxes = read_boxes(csv)
    boxes.insert(0, "row", pd.Index(images).get_indexer(boxes["image"]).astype(np.int64))
    ours = boxes[boxes["row"] >= 0].drop(columns="image").reset_index(drop=True)
    _report_lacking(csv, "boxes", len(boxes) - len(ours), len(boxes))
    columns = ours["finding"].map({name: column for column, name in enumerate(FINDINGS)})
    unlabelled = labels[ours["row"], columns.to_numpy(dtype=np.int64)] == 0
    if unlabelled.any():
        logger.warning(
            "%s: %d boxes are of a finding that their film is not labelled with; they are kept",
            csv,
            unlabelled.sum(),
        )
    return ours


def _place_relabels(csv: Path, images: pd.Series) -> np.ndarray:
    """Give each film its second reading, or NaN."""
    answers = read_relabels(csv)
    relabels: np.ndarray = answers.reindex(images).to_numpy(dtype=np.float32)
    _report_lacking(csv, "labels", int((~answers.index.isin(images)).sum()), len(answers))
    return relabels


def _report_lacking(csv: Path, what: str, lacking: int, total: int) -> None:
    if lacking:
        logger.info(
            "%s: %d of %d %s are of films that the CSV lacks, and left out",
            csv,
            lacking,
            total,
            what,
        )
