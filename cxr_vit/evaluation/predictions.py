"""A scored split as predictions.csv has it: every score is computed from this."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.config.columns import (
    ABOUT_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_PATTERN,
    LONGEST_LABEL,
    is_no_finding,
    probability_column,
    relabel_column,
    repeated_name,
)
from cxr_vit.data.records import RELABELS, UNKNOWN, Records
from cxr_vit.data.table_files import (
    read_columns,
    read_header,
    refuse_absent,
    refuse_rows,
    to_numbers,
)
from cxr_vit.data.text_files import original_text, write_csv
from cxr_vit.errors import DataError
from cxr_vit.evaluation.metrics import EvalOutputs, probabilities, refuse_nonfinite

#: What evaluate.py scores: a split, or every image of another data set.
SPLITS = ("train", "val", "test", "all")
_NUMBERS = ("age", "follow_up")
_NO_PREDICTIONS = "Give a predictions.csv that evaluate.py wrote."


@dataclass(frozen=True)
class Predictions:
    """Images with their labels and probabilities.

    Attributes
    ----------
    names
        The labels, C of them.
    table
        Columns `image`, `patient` and `split`, and those of `ABOUT_COLUMNS` that are known for any
        image: text, empty where unknown, but `age` (years) and `follow_up`, float64 or NaN.
    labels
        int8 ``[N, C]``: 0, 1 or `UNKNOWN`.
    probabilities
        float32 ``[N, C]``.
    relabels
        float32 ``[N, 4]`` in the order of `RELABELS`, NaN for images without them.
    """

    names: Tuple[str, ...]
    table: pd.DataFrame
    labels: np.ndarray
    probabilities: np.ndarray
    relabels: np.ndarray

    def __len__(self) -> int:
        return len(self.table)

    @property
    def findings(self) -> List[int]:
        """The columns that count in means: all but `No Finding`."""
        return [index for index, name in enumerate(self.names) if not is_no_finding(name)]

    @property
    def split(self) -> str:
        """The split of the images, `all` if they are of several."""
        splits = self.table["split"].unique()
        return str(splits[0]) if len(splits) == 1 else "all"

    @property
    def patients(self) -> np.ndarray:
        """The number of each image's patient, int64 ``[N]``, from 0."""
        codes, _ = pd.factorize(self.table["patient"])
        return codes.astype(np.int64)

    def take(self, rows: np.ndarray) -> Predictions:
        """Return these rows, int64 ``[n]`` or a mask ``[N]``."""
        return Predictions(
            self.names,
            self.table.loc[rows].reset_index(drop=True),
            self.labels[rows],
            self.probabilities[rows],
            self.relabels[rows],
        )

    def write(self, path: Path) -> None:
        """Write predictions.csv; `read_predictions` returns the same."""
        # One frame at the end: a column more copies the table after 100 of them.
        table = {name: self.table[name] for name in IMAGE_COLUMNS}
        for column, name in enumerate(self.names):
            of_name = pd.Series(self.labels[:, column], dtype=object)
            table[name] = of_name.where(of_name != UNKNOWN, None)
            table[probability_column(name)] = self.probabilities[:, column]
        for name in self.table.columns.intersection(ABOUT_COLUMNS, sort=False):
            values = self.table[name]
            texts = values.map(_shortest) if name in _NUMBERS else values
            table[name] = texts.where(values.notna(), "")
        for name, values in zip(RELABELS, self.relabels.T):
            if not np.isnan(values).all() and relabel_column(name) not in self.names:
                texts = ["" if np.isnan(value) else str(int(value)) for value in values]
                table[relabel_column(name)] = texts
        write_csv(path, pd.DataFrame(table))


def _shortest(value: float) -> str:
    """Return the shortest text that is the same number when it is read."""
    return np.format_float_positional(value, trim="-")


def predictions_of(records: Records, outputs: EvalOutputs) -> Predictions:
    """Return the predictions of a scored split; `records` are in the order of the outputs.

    Raises NonFiniteLoss if a logit is NaN or infinite.
    """
    assert len(records) == len(outputs.logits), "every image of the split is scored once"
    refuse_nonfinite(outputs.logits)
    about = {
        name: values
        for name, values in ((name, _known(records.table, name)) for name in ABOUT_COLUMNS)
        if values is not None
    }
    table = records.table[["image", "patient"]].reset_index(drop=True)
    return Predictions(
        tuple(outputs.names),
        table.assign(split=outputs.split, **about),
        outputs.labels.numpy().astype(np.int8),
        probabilities(outputs.logits).numpy(),
        records.relabels,
    )


def _known(table: pd.DataFrame, name: str) -> Optional[pd.Series]:
    """Return a column as `Predictions.table` has it, or None if nothing is known."""
    if name not in table:
        return None
    values = table[name].reset_index(drop=True)
    if name not in _NUMBERS:
        return values if (values != "").any() else None
    values = values.astype(np.float64).where(values >= 0)
    return values if values.notna().any() else None


def read_predictions(path: Path) -> Predictions:
    """Read a predictions.csv.

    Raises DataError if the file is none: a column is missing, a label has no legal name or is not
    0, 1 or empty, a probability is not from 0 to 1, an image has no name, no patient or several
    rows, a column is there twice, or there is no row.
    """
    header = read_header(path, IMAGE_COLUMNS)
    refuse_absent(str(path), IMAGE_COLUMNS, header, _NO_PREDICTIONS)
    names = [name for name in header if probability_column(name) in header]
    if not names:
        example = probability_column("Hernia")
        raise DataError(
            f"{path}: no label with a column of probabilities, such as Hernia and {example}."
            f" {_NO_PREDICTIONS}"
        )
    labels = tuple(map(original_text, names))
    _refuse_names(path, labels)
    about = [name for name in ABOUT_COLUMNS if name in header and name not in names]
    relabels = {
        name: column
        for name, column in zip(RELABELS, map(relabel_column, RELABELS))
        if column in header and column not in names
    }
    wanted = [*IMAGE_COLUMNS, *names, *map(probability_column, names), *about, *relabels.values()]
    read_header(path, wanted)  # refuses one that is there twice
    texts = read_columns(path, wanted)
    table = {name: texts[name].map(original_text) for name in (*IMAGE_COLUMNS, *about)}
    for name in IMAGE_COLUMNS[:2]:
        empty = (table[name] == "").to_numpy(dtype=bool)
        refuse_rows(path, empty, table["image"], f"no {name}", _NO_PREDICTIONS)
    wrong = ~table["split"].isin(SPLITS).to_numpy(dtype=bool)
    what = f"a split that is none of {', '.join(SPLITS)}"
    refuse_rows(path, wrong, table["split"], what, _NO_PREDICTIONS)
    repeated = table["image"].duplicated().to_numpy(dtype=bool)
    refuse_rows(path, repeated, table["image"], "an image that is there before", _NO_PREDICTIONS)
    table.update({name: _numbers(table[name]) for name in about if name in _NUMBERS})
    second = np.full((len(texts), len(RELABELS)), np.nan, np.float32)
    for name, column in relabels.items():
        values = _labels(path, texts[column])
        second[:, RELABELS.index(name)] = np.where(values == UNKNOWN, np.nan, values)
    probs = [_probabilities(path, texts[probability_column(name)]) for name in names]
    return Predictions(
        labels,
        pd.DataFrame(table),
        np.stack([_labels(path, texts[name]) for name in names], axis=1),
        np.stack(probs, axis=1),
        second,
    )


def _refuse_names(path: Path, names: Sequence[str]) -> None:
    """Raise DataError for names that a label cannot have: they are printed, and keys of scores."""
    problem = repeated_name(names)
    for name in names:
        if not re.match(LABEL_PATTERN, name) or len(name) > LONGEST_LABEL:
            problem = f"a label may not be called {name[:LONGEST_LABEL]!r}"
    if problem is not None:
        raise DataError(f"{path}: {problem}. {_NO_PREDICTIONS}")


def _labels(path: Path, texts: pd.Series) -> np.ndarray:
    values = texts.map({"": UNKNOWN, "0": 0, "1": 1})
    refuse_rows(
        path,
        values.isna().to_numpy(dtype=bool),
        texts,
        f"a value of {texts.name!r} that is not 0, 1 or empty",
        _NO_PREDICTIONS,
    )
    labels: np.ndarray = values.to_numpy(dtype=np.int8)
    return labels


def _numbers(texts: pd.Series) -> pd.Series:
    """Return what `to_numbers` does, exactly: earlier versions of pandas miss the last digit."""
    known = to_numbers(texts).notna()
    return pd.Series([float(text) if is_known else np.nan for text, is_known in zip(texts, known)])


def _probabilities(path: Path, texts: pd.Series) -> np.ndarray:
    values = _numbers(texts)
    wrong = ~values.between(0, 1).to_numpy(dtype=bool)
    what = f"a value of {texts.name!r} that is not from 0 to 1"
    refuse_rows(path, wrong, texts, what, _NO_PREDICTIONS)
    probs: np.ndarray = values.to_numpy(dtype=np.float32)
    return probs
