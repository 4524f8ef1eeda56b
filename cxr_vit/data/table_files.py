"""Read tables as text, and the columns that tables of chest X-rays have in common."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import re
import warnings
from pathlib import Path
from typing import Callable, Collection, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.data.parquet import parquet_columns, parquet_header
from cxr_vit.data.text_files import LIMITS, TABLE_LIMITS, check_text, read_raw, read_start
from cxr_vit.errors import DataError, suggestion

logger = logging.getLogger(__name__)

_OLDEST_AGE_YEARS = 120

#: Characters of a wrong value that messages quote.
_SHOWN = 100

#: NIH's CSV has 12, each of which is read as an array; a predictions.csv of 1,000 labels has 2,012.
_MAX_COLUMNS = 4096

#: Columns, and characters of their names, that messages quote.
_SHOWN_COLUMNS, _SHOWN_HEADER = 40, 1000

_SEPARATORS = (",", ";", "\t")

#: The first bytes of a Parquet file.
_PARQUET = b"PAR1"

_LIST_LINE = re.compile(r"\S+\.(png|jpe?g)\b", re.IGNORECASE)


def read_table(path: Path, required: Sequence[str], *, key: str, example: str) -> pd.DataFrame:
    """Read all columns of a CSV with a header as text; an empty or missing field is "".

    Commas, semicolons or tabs separate the fields, gzip may pack the file. `key` and `example` are
    the file's configuration key and NIH's name for it, for messages.

    Raises DataError if it is not such a table, lacks a required column, or has no rows.
    """
    raw = read_raw(path, LIMITS.size, unpacks=True)
    check_text(path, raw, LIMITS)
    first_line = _first_line(raw)
    if _LIST_LINE.match(first_line):
        raise DataError(
            f"{path}: looks like a list of file names such as train_val_list.txt (it begins with"
            f" {first_line[:60]!r}); set {key} to {example} or a table like it."
        )
    separator, header = _split_header(path, first_line, required)
    expected = (
        f"Expected {example} or a table like it, with the columns {', '.join(required)}. Set {key}."
    )
    refuse_absent(str(path), required, header, expected)
    try:
        with warnings.catch_warnings():
            # Rows longer than the header: NIH's bracketed columns in copies with a quoted header.
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            source, text = io.BytesIO(raw), {"dtype": str, "keep_default_na": False}
            table = pd.read_csv(
                source, sep=separator, index_col=False, encoding="utf-8-sig", **text
            )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{path}: not a readable CSV ({str(error).strip()}).") from error
    table.columns = table.columns.str.strip()
    if table.empty:
        raise DataError(f"{path}: no rows below the header. Fetch {example} again or set {key}.")
    return table


def read_header(path: Path, wanted: Collection[str]) -> List[str]:
    """Return the names of a table's columns, in order; of a CSV only the start is read.

    The separator is the one that finds the most of the wanted columns. Raises DataError if the file
    is no table, or if one of these is there twice.
    """
    start = read_start(path, TABLE_LIMITS.line)
    if start.startswith(_PARQUET):
        header = parquet_header(path, read_raw(path, TABLE_LIMITS.size))
    else:
        end = max(start.rfind(b"\n"), start.rfind(b"\r"))
        check_text(path, start[:end] if end >= 0 else start, TABLE_LIMITS)
        _, header = _split_header(path, _first_line(start), wanted)
    twice = [name for name in dict.fromkeys(header) if name in wanted and header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} is there twice. Rename one of them.")
    return header


def read_columns(path: Path, names: Sequence[str]) -> pd.DataFrame:
    """Read these columns of a CSV, TSV or Parquet file as text, without blanks at the ends.

    The file has the columns, each once. An empty field is "". Raises DataError if the file is no
    such table, if a row has more or fewer fields than the header, or if there are no rows.
    """
    raw = read_raw(path, TABLE_LIMITS.size, unpacks=True)
    if raw.startswith(_PARQUET):
        texts = parquet_columns(path, raw, names)
    else:
        check_text(path, raw, TABLE_LIMITS)
        texts = _csv_columns(path, raw, names)
    table = pd.DataFrame(dict(zip(names, texts)), dtype=object)
    if table.empty:
        raise DataError(f"{path}: no rows below the header. Give the whole table.")
    return table


class _Stripped(Dict[str, str]):
    """Text -> the text without blanks at the ends, one object however often it is there."""

    def __missing__(self, text: str) -> str:
        return self.setdefault(text, text.strip())


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module read fields as long as a line may be: its own limit is 131,072."""
    before = csv.field_size_limit(TABLE_LIMITS.line)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@_long_fields()
def _csv_columns(path: Path, raw: bytes, names: Sequence[str]) -> List[List[str]]:
    separator, header = _split_header(path, _first_line(raw), names)
    refuse_absent(str(path), names, header, "Separate all lines alike.")
    places, width, stripped = [header.index(name) for name in names], len(header), _Stripped()
    # A header may end with a separator where the rows do not.
    least = max(column for column, name in enumerate(header, 1) if name)
    texts: List[List[str]] = [[] for _ in names]
    short: List[Tuple[int, int]] = []
    row = -1  # the header
    try:
        lines = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig", newline="")
        for cells in csv.reader(lines, delimiter=separator, strict=True):
            if not any(map(str.strip, cells)):
                continue
            row += 1
            if row == 0:
                continue
            if any(map(str.strip, cells[width:])):
                raise DataError(
                    f"{path}: row {row} has more fields than the {width} of the header. Quote the"
                    f" fields that have a {separator!r} in their text."
                )
            if len(cells) < least:
                short.append((row, len(cells)))
            cells += [""] * (width - len(cells))
            for column, place in zip(texts, places):
                column.append(stripped[cells[place]])
    except csv.Error as error:
        raise DataError(f"{path}: not a readable CSV ({error} in row {row + 1}).") from error
    if short:
        first, count = short[0]
        raise DataError(
            f"{path}: {len(short)} of {row} rows are cut off, first row {first}: it has {count}"
            f" fields, the header {least}. Fetch the file again, or write all fields of a row."
        )
    return texts


def refuse_absent(where: str, names: Iterable[str], header: Sequence[str], remedy: str) -> None:
    """Raise DataError if a header lacks any of these columns, with near ones and those it has."""
    absent = [name for name in dict.fromkeys(names) if name not in header]
    if absent:
        shown = ", ".join(header[:_SHOWN_COLUMNS]) + (", ..." if header[_SHOWN_COLUMNS:] else "")
        raise DataError(
            f"{where}: no column {', '.join(map(repr, absent[:_SHOWN_COLUMNS]))}."
            f"{suggestion(absent[0], header)} It has the columns {shown[:_SHOWN_HEADER]}. {remedy}"
        )


def _first_line(raw: bytes) -> str:
    """Return the first line that is not blank, or "" if there is none."""
    lines = re.split(r"[\r\n]+", raw[: TABLE_LIMITS.line].decode("utf-8-sig", errors="ignore"))
    return next((line for line in lines if line.strip()), "")


@_long_fields()
def _split_header(path: Path, line: str, wanted: Collection[str]) -> Tuple[str, List[str]]:
    """Return the separator that finds the most of the wanted columns, and the header's fields."""
    try:
        found = {mark: next(csv.reader([line], delimiter=mark)) for mark in _SEPARATORS}
    except csv.Error as error:
        raise DataError(f"{path}: not a readable CSV ({error}).") from error
    headers = {mark: [name.strip() for name in names] for mark, names in found.items()}
    best = max(headers, key=lambda mark: (len({*wanted} & {*headers[mark]}), len(headers[mark])))
    if len(headers[best]) > _MAX_COLUMNS:
        raise DataError(f"{path}: more than {_MAX_COLUMNS} columns. Give a table of images.")
    return best, headers[best]


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


def read_ages(texts: pd.Series, path: Optional[Path] = None) -> pd.Series:
    """Read `58`, `058Y`, `011M` and `005D` as years; impossible ages become NaN.

    With the path of the table, a warning counts the texts that are no age.
    """

    def read(distinct: pd.Series) -> pd.Series:
        parts = distinct.str.extract(r"^(\d+(?:\.\d+)?)([YMD]?)$")
        units = parts[1].map({"Y": 1.0, "": 1.0, "M": 12.0, "D": 365.25})
        return pd.to_numeric(parts[0], errors="coerce").astype(np.float64) / units

    years = per_text(texts, read)
    unread = texts[(years.isna() & (texts != "")).to_numpy(dtype=bool)]
    if path is not None and len(unread):
        text = "%s: %d ages are not understood and count as unknown, e.g. %r"
        logger.warning(text, path, len(unread), unread.iloc[0][:_SHOWN])
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
