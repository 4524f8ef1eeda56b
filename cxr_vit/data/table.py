"""Read the records of any table: CSV, TSV or Parquet with the columns that `data.columns` names."""

from __future__ import annotations

import logging
import re
from itertools import chain
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.config.columns import Column, Columns, PatternColumn, searchable_length
from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.label_columns import (
    MEANINGS,
    column_labels,
    listed_labels,
    listed_tokens,
    refuse_names,
    warn_of_constant,
)
from cxr_vit.data.records import UNKNOWN, Records
from cxr_vit.data.table_files import (
    read_ages,
    read_columns,
    read_header,
    refuse_absent,
    refuse_rows,
)
from cxr_vit.data.text_files import find_tables
from cxr_vit.errors import DataError

logger = logging.getLogger(__name__)

#: Control characters, a step up, a folder, or nothing: no name and no path of a file.
_NO_IMAGE = re.compile(r"[\x00-\x1f\x7f]|(?:^|[/\\])(?:\.\.(?:[/\\]|$)|\.?$)")

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev", "tune"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "": "",
}
_SEXES = {"male": "M", "m": "M", "female": "F", "f": "F"}

#: Columns in which the rows of an image agree.
_OF_IMAGE = ("patient", "split", "sex", "age", "view", "source")

#: Different values that a message lists.
_SHOWN_VALUES = 20


class _Part(NamedTuple):
    """What is read of one file and those joined to it."""

    #: Column `image`, and those of `_OF_IMAGE`.
    table: pd.DataFrame
    labels: np.ndarray


def labels_matching(data: DataSection) -> List[str]:
    """Return the columns of the table that `data.labels` matches, in the table's order.

    Only headers are read. Raises DataError if there is none, or if one column holds all labels:
    the message then lists those found.
    """
    assert data.columns is not None and isinstance(data.labels, str)
    tables, joined = find_tables(data)
    first = next(iter(tables.values()))
    if data.columns.labels is not None:
        table = _joined(first, joined, [str(data.columns.labels)])
        fields = _values(first, table, data.columns.labels, "labels", may_be_empty=True)
        raise DataError(
            f"{first}: data.labels={data.labels} must be a list, since data.columns.labels names"
            f" one column of all labels. It holds {listed_tokens(fields, data.label_separator)}."
        )
    used = {str(column) for column in _columns(data.columns).values()}
    headers = [read_header(path, used) for path in (first, *joined)]
    names = [name for name in dict.fromkeys(chain(*headers)) if name and name not in used]
    matching = [name for name in names if _matches(data.labels, name)]
    if not matching:
        refuse_absent(str(first), [data.labels], names, "Correct data.labels.")
    refuse_names(first, matching)
    return matching


def _matches(pattern: str, name: str) -> bool:
    """Whether ``*`` (any text) and ``?`` (a character) match a name, without backtracking.

    The parts between two ``*`` are found from left to right, each as early as possible.
    """
    first, *parts = [re.escape(part).replace(r"\?", ".") for part in pattern.split("*")]
    if not parts:
        return re.fullmatch(first, name) is not None
    found, last = re.match(first, name), parts.pop()
    for part in parts:
        if found is None:
            return False
        found = re.compile(part).search(name, found.end())
    start = len(name) - len(pattern.rpartition("*")[2])
    if found is None or start < found.end():
        return False
    return re.compile(last).match(name, start) is not None


def read_table_records(data: DataSection) -> Tuple[List[Path], Records]:
    """Return the files of `data.csv` and `data.join`, and the records of all their images.

    Raises DataError if a file or a column is missing, or if a value is none of the allowed ones.
    """
    tables, joined = find_tables(data)
    names = data.labels if isinstance(data.labels, list) else labels_matching(data)
    parts = [_read_part(path, split, joined, names, data) for split, path in tables.items()]
    paths = list(tables.values())
    table, labels = _one_row_per_image(paths, parts, data)
    warn_of_constant(labels, names)
    given = table.pop("split").to_numpy(dtype=object)
    assert data.columns is not None
    has_split = data.columns.split is not None or "" not in tables
    records = Records(table, labels, variant="table", given_split=given if has_split else None)
    return [*paths, *joined], records


def _read_part(
    path: Path, split: str, joined: Sequence[Path], names: Sequence[str], data: DataSection
) -> _Part:
    """Read a file of `data.csv`, all of whose images are in `split` unless that is empty."""
    assert data.columns is not None
    columns = _columns(data.columns)
    of_labels = [] if "labels" in columns else names
    raw = _joined(path, joined, [*map(str, columns.values()), *of_labels])
    texts = {
        key: _values(path, raw, column, key, may_be_empty=key not in ("image", "patient"))
        for key, column in columns.items()
    }
    blank = pd.Series([""] * len(raw), dtype=object)
    table = pd.DataFrame({key: texts.get(key, blank) for key in ("image", *_OF_IMAGE)})
    invalid = np.array([_NO_IMAGE.search(text) is not None for text in table["image"]])
    hint = "It is the name or the path of an image file, with any extension or none."
    refuse_rows(path, invalid, table["image"], "no name of an image", hint)
    nobody = (table["patient"] == "").to_numpy(dtype=bool)
    hint = "Splits are made by patient: give each image's, or columns.patient the column of images."
    refuse_rows(path, nobody, table["image"], "no patient", hint)
    table["split"] = split or _splits(path, table["split"])
    table["sex"] = table["sex"].map(lambda text: _SEXES.get(text.lower(), text))
    table["age"] = read_ages(table["age"], path)
    if "labels" in columns:
        labels = listed_labels(path, texts["labels"], names, data)
    else:
        labels = column_labels(path, raw, names, data)
    return _Part(table, labels)


def _columns(columns: Columns) -> Dict[str, Column]:
    given = {key: getattr(columns, key) for key in type(columns).model_fields}
    return {key: column for key, column in given.items() if column is not None}


def _joined(path: Path, joined: Sequence[Path], wanted: Sequence[str]) -> pd.DataFrame:
    """Return the wanted columns of a table, to which others are joined.

    A row of `path` gets the values of the row that has the same values in all shared columns, or
    empty ones.
    """
    headers = {file: read_header(file, wanted) for file in (path, *joined)}
    known = [name for name in dict.fromkeys(chain(*headers.values())) if name]
    remedy = "Correct data.columns or data.labels."
    refuse_absent(", ".join(map(str, headers)), wanted, known, remedy)
    keys = _keys(headers)
    needed = {*wanted, *(key for shared in keys.values() for key in shared)}
    table = read_columns(path, [name for name in headers[path] if name in needed])
    for file, shared in keys.items():
        other = read_columns(file, [name for name in headers[file] if name in needed])
        texts = other[shared[0]].str.cat([other[key] for key in shared[1:]], sep=", ")
        repeated = other.duplicated(shared).to_numpy()
        what = f"a repeated {' with '.join(shared)}"
        refuse_rows(file, repeated, texts, what, "Each row of data.csv needs one partner at most.")
        other = other[(other[shared] != "").any(axis=1)]  # nothing is the partner of nothing
        table = table.merge(other, on=shared, how="left", indicator="_partner")
        lacking = int((table.pop("_partner") == "left_only").sum())
        table = table.fillna("")  # the next file may be joined on these columns
        if lacking == len(table):
            raise DataError(
                f"{file}: has a partner for none of the {lacking} rows of {path}, joined on"
                f" {', '.join(shared)}. Row 1 has {', '.join(table.loc[0, shared])!r} there and"
                f" {texts.iloc[0]!r} here."
            )
        if lacking:
            text = "%s: no partner for %d of %d rows of %s; their cells are empty"
            logger.warning(text, file, lacking, len(table), path)
    return table


def _keys(headers: Mapping[Path, List[str]]) -> Dict[Path, List[str]]:
    """Return the columns that each file but the first shares with those before it."""
    (path, before), *others = headers.items()
    keys: Dict[Path, List[str]] = {}
    for file, header in others:
        keys[file] = [name for name in header if name and name in before]
        if not keys[file]:
            raise DataError(
                f"{file}: shares no column with {path}, so it cannot be joined."
                f" {path.name} has {', '.join(before)}; {file.name} has {', '.join(header)}."
            )
        before = [*before, *header]
    return keys


def _values(
    path: Path, table: pd.DataFrame, column: Column, key: str, *, may_be_empty: bool
) -> pd.Series:
    """Return a column, or the part of each value that its pattern finds."""
    texts = table[str(column)]
    if not isinstance(column, PatternColumn):
        return texts
    pattern, longest = re.compile(column.pattern), searchable_length(column.pattern)
    too_long = (texts.str.len() > longest).to_numpy(dtype=bool)
    what = f"a text too long to search for data.columns.{key}.pattern={column.pattern}"
    hint = f"It searches at most {longest} characters: simplify it or shorten the text."
    refuse_rows(path, too_long, texts, what, hint)
    group = min(1, pattern.groups)
    found = [pattern.search(text) for text in texts]
    unmatched = np.array([match is None or match[group] is None for match in found], dtype=bool)
    if may_be_empty:
        unmatched &= (texts != "").to_numpy(dtype=bool)
    what = f"no match of data.columns.{key}.pattern={column.pattern} in the column {str(column)!r}"
    refuse_rows(path, unmatched, texts, what, "Correct the pattern.")
    parts = ["" if match is None else match[group].strip() for match in found]
    return pd.Series(parts, index=texts.index, dtype=object)


def _splits(path: Path, texts: pd.Series) -> pd.Series:
    splits = texts.str.lower().map(_SPLIT_WORDS)
    if splits.isna().any():
        found = ", ".join(f"{text!r} ({count})" for text, count in _counts(texts))
        words = ", ".join(sorted(word for word in _SPLIT_WORDS if word))
        raise DataError(
            f"{path}: data.columns.split holds {found}. Known words: {words}, or empty for no"
            " split."
        )
    return splits


def _counts(texts: pd.Series) -> List[Tuple[str, int]]:
    return list(texts.value_counts().head(_SHOWN_VALUES).items())


def _one_row_per_image(
    paths: Sequence[Path], parts: Sequence[_Part], data: DataSection
) -> Tuple[pd.DataFrame, np.ndarray]:
    """Return one row per image, in the order of their first ones; merge the labels of several.

    `paths` are the files of the parts.
    """
    table = pd.concat([part.table for part in parts], ignore_index=True)
    labels = np.concatenate([part.labels for part in parts])
    images = table["image"]
    codes, distinct = pd.factorize(images)
    if len(distinct) == len(table):
        return table, labels
    repeated = images.duplicated().to_numpy()
    first = np.flatnonzero(~repeated)
    rows = list(zip(paths, (len(part.table) for part in parts)))
    if data.repeated_images == "error":
        hint = (
            "Keep one row per image, or set data.repeated_images to any or majority if several"
            " readers labelled an image."
        )
        _refuse_in_files(rows, repeated, images, "a repeated image{}", hint, first[codes])
    for key in _OF_IMAGE:
        values = pd.factorize(table[key])[0]  # NaN equals NaN
        differs = values != values[first][codes]
        hint = "All rows of an image have the same patient, split, sex, age, view and source."
        what = f"another {key} than in the image's first row{{}}"
        _refuse_in_files(rows, differs, images, what, hint, first[codes])
    positive = _sums(codes, labels == 1, len(distinct))
    known = positive + _sums(codes, labels == 0, len(distinct))
    merged = np.where(2 * positive > known, 1, 0)
    if data.repeated_images == "any":
        merged = np.where(positive > 0, 1, 0)
    else:
        merged[2 * positive == known] = MEANINGS[data.uncertain]
    merged[known == 0] = UNKNOWN
    logger.info(
        "%s: %d rows of %d images; a label is positive by data.repeated_images=%s",
        ", ".join(map(str, paths)), len(table), len(distinct), data.repeated_images,
    )  # fmt: skip
    return table.iloc[first].reset_index(drop=True), merged.astype(np.int8)


def _refuse_in_files(
    files: Sequence[Tuple[Path, int]],
    wrong: np.ndarray,
    images: pd.Series,
    what: str,
    remedy: str,
    first: np.ndarray,
) -> None:
    """Raise DataError for the first file with a wrong row, with the rows as that file has them.

    `files` are the tables that the rows come from, with their numbers of rows. `first` is the first
    row of each row's image; with several files, it fills the place in `what`.
    """
    ends = np.cumsum([count for _, count in files])
    for (path, count), end in zip(files, ends):
        rows = slice(end - count, end)
        if wrong[rows].any():
            row = first[rows][int(np.argmax(wrong[rows]))]
            place = int(np.searchsorted(ends, row, side="right"))
            other, length = files[place]
            where = f" (row {row - ends[place] + length + 1} of {other})" if files[1:] else ""
            refuse_rows(path, wrong[rows], images[rows], what.format(where), remedy)


def _sums(codes: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Sum bool ``[rows, columns]`` over the rows of each code, int64 ``[count, columns]``."""
    sums = np.zeros((count, values.shape[1]), dtype=np.int64)
    np.add.at(sums, codes, values)
    return sums
