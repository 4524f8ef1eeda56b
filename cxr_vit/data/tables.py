"""Read tables as text, and the columns that tables of chest X-rays have in common."""

from __future__ import annotations

import io
import logging
import re
import warnings
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import pandas as pd

from cxr_vit.data.text_files import read_text
from cxr_vit.errors import DataError

logger = logging.getLogger(__name__)

_OLDEST_AGE_YEARS = 120

#: Characters of a wrong value that messages quote.
_SHOWN = 100

#: NIH's CSV has 12, each of which is read as an array.
_MAX_COLUMNS = 1000

_LIST_LINE = re.compile(r"\S+\.(png|jpe?g)\b", re.IGNORECASE)


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


def refuse_rows(path: Path, wrong: np.ndarray, values: pd.Series, what: str, remedy: str) -> None:
    """Raise DataError if any row is wrong (bool ``[rows]``), with their number and the first.

    Rows are counted from 1 below the header; `values` is what the rows hold.
    """
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{path}: {what} in {int(wrong.sum())} of {len(wrong)} rows, first in row {row + 1}:"
            f" {str(values.iloc[row])[:_SHOWN]!r}. {remedy}"
        )


def read_ages(texts: pd.Series) -> pd.Series:
    """Read `58`, `058Y`, `011M` and `005D` as years; impossible ages become NaN."""

    def read(distinct: pd.Series) -> pd.Series:
        parts = distinct.str.extract(r"^(\d+(?:\.\d+)?)([YMD]?)$")
        units = parts[1].map({"Y": 1.0, "": 1.0, "M": 12.0, "D": 365.25})
        return pd.to_numeric(parts[0], errors="coerce").astype(np.float64) / units

    years = per_text(texts, read)
    impossible = years > _OLDEST_AGE_YEARS
    if impossible.any():
        text = "%d ages over %d years count as unknown"
        logger.warning(text, impossible.sum(), _OLDEST_AGE_YEARS)
    return years.where(~impossible)


def to_numbers(texts: pd.Series) -> pd.Series:
    """Return texts as float64; NaN where they are no finite number."""
    numbers = pd.to_numeric(texts, errors="coerce").astype(np.float64)
    return numbers.where(np.isfinite(numbers))


def per_text(texts: pd.Series, read: Callable[[pd.Series], pd.Series]) -> pd.Series:
    """Apply `read` once per distinct text: 112,120 rows have a few hundred."""
    codes, distinct = pd.factorize(texts)
    return read(pd.Series(distinct)).iloc[codes].reset_index(drop=True)
