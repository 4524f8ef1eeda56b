"""Text files from anywhere, read safely: what they are taken for, and what is said of it.

Imports no torch.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.errors import DataError

__all__ = ["read_table", "read_text", "refuse_rows"]

#: What lies in place of a text file, by how it begins.
_MISTAKEN: Tuple[Tuple[bytes, str], ...] = (
    (b"\xff\xfe", "UTF-16 text. Save it as UTF-8."),
    (b"\xfe\xff", "UTF-16 text. Save it as UTF-8."),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file. Run git lfs pull."),
    (b"<", "a web page or XML. Download the file itself."),
    (b"\x1f\x8b", "packed with gzip. Unpack it with gunzip."),
    (b"PK\x03\x04", "a zip archive or an Excel workbook. Unpack it, or export it as CSV."),
    (b"\x89PNG", "a PNG image. Give the text file that belongs here."),
)
_FILE_NAME = re.compile(r"\S+\.(png|jpe?g)\b", re.IGNORECASE)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without its byte order mark if it has one.

    Raises
    ------
    DataError
        If the file cannot be read, is empty, or is anything but UTF-8 text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if not raw.strip():
        raise DataError(f"{path}: the file is empty. Fetch it again.")
    for start, what in _MISTAKEN:
        if raw.startswith(start):
            raise DataError(f"{path}: this is {what}")
    if b"\0" in raw:
        raise DataError(f"{path}: not text, or UTF-16 (it holds zero bytes). Save it as UTF-8.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8 text (byte 0x{raw[error.start]:02x} in line {line}); perhaps"
            " Latin-1 or Windows-1252. Save it as UTF-8."
        ) from error


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
