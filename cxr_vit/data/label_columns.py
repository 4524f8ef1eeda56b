"""Read labels as 0, 1 and unknown: from a column per label, or from one column of all labels."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Dict, List, Mapping, Sequence

import numpy as np
import pandas as pd

from cxr_vit.config.columns import LABEL_PATTERN, LONGEST_LABEL, is_no_finding, repeated_name
from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.records import UNKNOWN
from cxr_vit.data.table_files import refuse_rows
from cxr_vit.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)

#: What `data.uncertain` and `data.blank` may be, as labels.
MEANINGS = {"negative": 0, "positive": 1, "unknown": UNKNOWN}
_POSITIVE = ("1", "yes", "true", "positive", "y", "t")
_NEGATIVE = ("0", "no", "false", "negative", "n", "f")
_UNCERTAIN = ("-1", "u", "uncertain")
_BLANK = ("", "nan", "na", "null", "none")
_HINT = (
    f"Write {', '.join(_POSITIVE)} for positive, {', '.join(_NEGATIVE)} for negative,"
    f" {', '.join(_UNCERTAIN)} for uncertain, or nothing."
)
#: In place of a value that is none of these.
_WRONG = -2

#: Between labels in one column, as tables have them.
_SEPARATORS = ("|", ";", ",", "/", "+")

#: Labels that a message lists.
_SHOWN_TOKENS = 50


def refuse_names(path: Path, names: Sequence[str]) -> None:
    """Raise DataError for columns whose names cannot be those of labels."""
    for name in names:
        if len(name) > LONGEST_LABEL or not re.fullmatch(LABEL_PATTERN, name):
            raise DataError(
                f"{path}: the column {name[:LONGEST_LABEL]!r} cannot be a label: its name is longer"
                f" than {LONGEST_LABEL} characters or has control characters. List data.labels."
            )
    repeated = repeated_name(names)
    if repeated:
        raise DataError(f"{path}: {repeated}. Rename one, or list data.labels.")


def column_labels(
    path: Path, table: pd.DataFrame, names: Sequence[str], data: DataSection
) -> np.ndarray:
    """Return the labels of a table with a column per label, int8 ``[rows, labels]``.

    Raises DataError for a value that is neither positive nor negative, uncertain or empty.
    """
    words = {
        **dict.fromkeys(_POSITIVE, 1),
        **dict.fromkeys(_NEGATIVE, 0),
        **dict.fromkeys(_UNCERTAIN, MEANINGS[data.uncertain]),
        **dict.fromkeys(_BLANK, MEANINGS[data.blank]),
    }
    labels = np.empty((len(table), len(names)), dtype=np.int8)
    for column, name in enumerate(names):
        codes, distinct = pd.factorize(table[name])
        read = np.array([_read_value(text, words) for text in distinct], dtype=np.int8)
        labels[:, column] = read[codes]
        wrong = labels[:, column] == _WRONG
        refuse_rows(path, wrong, table[name], f"not a value of the label {name!r}", _HINT)
    healthy = np.array(list(map(is_no_finding, names)))
    _warn_of_both(
        path, (labels[:, healthy] == 1).any(axis=1) & (labels[:, ~healthy] == 1).any(axis=1)
    )
    return labels


def _read_value(text: str, words: Dict[str, int]) -> int:
    word = text.lower()
    if re.fullmatch(r"[+-]?[01]\.0*", word):  # 1.0
        word = word.partition(".")[0].lstrip("+")
    return words.get("0" if word == "-0" else word, _WRONG)


def listed_labels(
    path: Path, fields: pd.Series, names: Sequence[str], data: DataSection
) -> np.ndarray:
    """Return the labels of a table with one column of all labels, int8 ``[rows, labels]``.

    A field without a label, or with a word for nothing, means `data.blank` for every label. What is
    no label is another finding, which the log counts. Raises DataError if a name differs from a
    label in upper and lower case only.
    """
    columns = {name: column for column, name in enumerate(names)}
    healthy = next((name for name in names if is_no_finding(name)), None)
    codes, distinct = pd.factorize(fields)
    labels = np.zeros((len(distinct), len(names)), dtype=np.int8)
    counts = np.bincount(codes, minlength=len(distinct))
    others: Counter[str] = Counter()
    has_both = np.zeros(len(distinct), dtype=bool)
    for row, field in enumerate(distinct):
        tokens = _tokens(field, data.label_separator)
        if not tokens or (field.lower() in _BLANK and field not in columns):
            labels[row], tokens = MEANINGS[data.blank], []
        has_both[row] = len(set(map(is_no_finding, tokens))) > 1
        for token in tokens:
            name = healthy if is_no_finding(token) and healthy else token
            if name in columns:
                labels[row, columns[name]] = 1
            elif not is_no_finding(token):
                others[token] += int(counts[row])
    _refuse_other_case(path, others, names)
    _refuse_other_separator(path, others, names, data.label_separator)
    if others:
        text = "%s: %d other findings, which count as none of the labels: %s"
        logger.warning(text, path, len(others), _shown(others, names))
    _warn_of_both(path, has_both[codes])
    return labels[codes]


def _warn_of_both(path: Path, has_both: np.ndarray) -> None:
    if has_both.any():
        text = "%s: %d of %d rows have No Finding together with another label, first row %d"
        logger.warning(text, path, has_both.sum(), len(has_both), int(np.argmax(has_both)) + 1)


def _refuse_other_case(path: Path, others: Counter[str], names: Sequence[str]) -> None:
    labels = {name.lower(): name for name in names}
    for token, count in others.items():
        if token.lower() in labels:
            raise DataError(
                f"{path}: {count} rows have the label {token!r}, which data.labels spells"
                f" {labels[token.lower()]!r}. Spell both alike."
            )


def _refuse_other_separator(
    path: Path, others: Mapping[str, int], names: Sequence[str], separator: str
) -> None:
    """Raise DataError for a token that another separator divides into labels."""
    for mark, (token, count) in itertools.product(_SEPARATORS, others.items()):
        parts = _tokens(token, mark)
        if len(parts) > 1 and all(part in names or is_no_finding(part) for part in parts):
            raise DataError(
                f"{path}: {count} rows have {token!r}, which data.label_separator={separator!r}"
                f" does not divide. Set data.label_separator={mark!r}."
            )


def listed_tokens(fields: pd.Series, separator: str) -> str:
    """Return the labels in a column of all labels, the most frequent first, with their rows."""
    counts: Counter[str] = Counter()
    for field, count in fields.value_counts().items():
        counts.update(dict.fromkeys(_tokens(field, separator), int(count)))
    return _shown(counts, [])


def _tokens(field: str, separator: str) -> List[str]:
    """Return the different labels in a field, in order."""
    tokens = [token.strip() for token in field.split(separator)]
    return [token for token in dict.fromkeys(tokens) if token]


def _shown(counts: Counter[str], names: Sequence[str]) -> str:
    shown = []
    for token, count in counts.most_common(_SHOWN_TOKENS):
        near = did_you_mean(token, names)
        meant = f", did you mean {near!r}?" if near else ""
        shown.append(f"{token[:100]!r} ({count}{meant})")
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def warn_of_constant(labels: np.ndarray, names: Sequence[str]) -> None:
    """Log the labels that have one value only, so that nothing can be learned or scored."""
    for what, value in (("unknown", UNKNOWN), ("0", 0), ("1", 1)):
        constant = ((labels == value) | (labels == UNKNOWN)).all(axis=0)
        constant &= (labels == value).any(axis=0)
        found = [name for name, is_constant in zip(names, constant) if is_constant]
        if found:
            where = "in all images" if value == UNKNOWN else "wherever it is known"
            text = "a label that is %s %s can be neither learned nor scored: %s"
            logger.warning(text, what, where, ", ".join(found))
