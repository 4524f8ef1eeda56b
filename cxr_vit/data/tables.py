"""CSVs from anywhere, read as text: what they are taken for, and what is said of it.

Imports no torch.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Sequence

import numpy as np
import pandas as pd

from cxr_vit.data.text_files import read_text
from cxr_vit.errors import DataError

__all__ = ["read_table", "refuse_rows"]

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
