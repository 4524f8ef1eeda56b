"""The NIH CSV -> a table of records, one a film. Imports no torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional

import numpy as np
import pandas as pd

from cxr_vit.data.labels import multi_hot
from cxr_vit.errors import DataError

__all__ = ["Records", "find_csv", "read_records"]

logger = logging.getLogger(__name__)

CSV_NAMES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
_REQUIRED = {"Image Index": "image", "Finding Labels": "findings", "Patient ID": "patient"}
_OPTIONAL = {"Patient Age": "age", "Patient Gender": "sex", "View Position": "view"}
_OLDEST_AGE_YEARS = 120


@dataclass(frozen=True)
class Records:
    """Films and their labels, row by row.

    Attributes
    ----------
    table
        Columns `image` (file name), `patient` (int), `findings` (text), `age` (years, float, NaN
        where unknown), `sex` and `view` (text, empty where unknown), `path`.
    labels
        uint8 ``[len(table), classes]``, zeros and ones.
    """

    table: pd.DataFrame
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.table)

    def take(self, rows: np.ndarray) -> Records:
        """Return the records of these rows (int64 ``[n]``), in this order."""
        return Records(self.table.iloc[rows].reset_index(drop=True), self.labels[rows])


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
    images: Dict[str, str],
    *,
    include_no_finding: bool,
    on_missing: str,
    root: Optional[Path] = None,
) -> Records:
    """Read the CSV and join each row with its image file.

    Parameters
    ----------
    csv
        NIH's CSV in its v2020 or its older form; columns are found by name.
    images
        File name -> path, as `find_images` gives it.
    include_no_finding
        Whether `No Finding` is a class of its own.
    on_missing
        ``"error"`` or ``"skip"``: what to do about rows whose image is not there.
    root
        Where the images were looked for, for the message; the CSV's folder by default.

    Raises
    ------
    DataError
        On a CSV of another kind, a duplicate row, an unknown finding or a missing image.
    """
    table = _read_table(csv)
    table["path"] = table["image"].map(images)
    try:
        labels = multi_hot(table["findings"].tolist(), include_no_finding=include_no_finding)
    except DataError as error:
        raise DataError(f"{csv}: {error}") from error
    missing = table["path"].isna().to_numpy()
    if missing.any():
        _report_missing(table["image"][missing], len(table), root or csv.parent, on_missing)
    return Records(table[~missing].reset_index(drop=True), labels[~missing])


def _read_table(csv: Path) -> pd.DataFrame:
    try:
        raw = pd.read_csv(csv, dtype=str, index_col=False, keep_default_na=False)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{csv}: not a readable CSV ({error}).") from error
    absent = [column for column in _REQUIRED if column not in raw.columns]
    if absent or raw.empty:
        what = f"no column {', '.join(map(repr, absent))}" if absent else "no rows"
        raise DataError(
            f"{csv}: {what}. Expected NIH's label CSV with the columns {', '.join(_REQUIRED)};"
            f" this file begins with {', '.join(map(str, raw.columns[:3]))}."
        )
    table = raw[list(_REQUIRED)].rename(columns=_REQUIRED)
    for column, name in _OPTIONAL.items():
        table[name] = raw[column] if column in raw.columns else ""
    _check_names(table["image"], csv)
    is_number = table["patient"].str.match(r"^\d{1,18}$").to_numpy(dtype=bool)
    if not is_number.all():
        row = int(is_number.argmin())
        raise DataError(
            f"{csv}: row {row + 1} has the Patient ID {table['patient'][row]!r}; it must be a"
            " whole number."
        )
    table["patient"] = table["patient"].astype(np.int64)
    table["age"] = _ages(table["age"])
    return table


def _check_names(names: pd.Series, csv: Path) -> None:
    duplicates = names[names.duplicated()]
    if len(duplicates):
        raise DataError(
            f"{csv}: {len(duplicates)} duplicate rows, first: {duplicates.iloc[0]}."
            " Keep one row a film."
        )
    unsafe = names[names.str.contains(r"[/\\]|^\.\.?$", regex=True)]
    if len(unsafe):
        raise DataError(
            f"{csv}: 'Image Index' {unsafe.iloc[0]!r} is a path; it must be a file name."
        )


def _ages(texts: pd.Series) -> pd.Series:
    """Read `58`, `058Y`, `011M` and `005D` as years; impossible ages become NaN, counted."""
    parts = texts.str.extract(r"^0*(\d+)([YMD]?)$")
    years = pd.to_numeric(parts[0], errors="coerce")
    years = years / parts[1].map({"Y": 1.0, "": 1.0, "M": 12.0, "D": 365.25})
    impossible = years > _OLDEST_AGE_YEARS
    if impossible.any():
        logger.warning(
            "%d ages over %d years count as unknown", impossible.sum(), _OLDEST_AGE_YEARS
        )
    return years.where(~impossible)


def _report_missing(names: pd.Series, total: int, root: Path, on_missing: str) -> None:
    if on_missing == "error" or len(names) == total:
        listed = ", ".join(names.iloc[:5])
        raise DataError(
            f"{len(names)} of {total} images are missing under {root}, first: {listed}."
            + ("" if len(names) == total else " Set data.on_missing=skip to go on without them.")
        )
    logger.warning("%d of %d images are missing under %s and left out", len(names), total, root)
