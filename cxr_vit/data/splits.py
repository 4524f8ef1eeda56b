"""Split the images into train, val and test: by the table, by lists, by patient, or at random.

A random split by image puts the same patient on both sides: on the real CSV, more than 80 % of the
validation images of a 5 % split share a patient with training, and a network recognizes patients.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import NamedTuple, Set, Tuple

import numpy as np
import pandas as pd

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.names import NameIndex, parts_of, stem
from cxr_vit.data.records import Records
from cxr_vit.data.text_files import LIST_NAMES, find_lists, read_list
from cxr_vit.errors import DataError

logger = logging.getLogger(__name__)

SPLIT_NAMES: Tuple[str, ...] = ("train", "val", "test")


class Splits(NamedTuple):
    """The rows of each split, int64 ``[n]``, ascending, and how they were made."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    kind: str  # "table", "official", "patient", "random" or "all"
    source: str = ""  # files or seed, for messages

    def keep(self, usable: np.ndarray) -> Splits:
        """Return the splits of the usable records (bool ``[records]``), renumbered.

        No image moves to another split. Raises DataError if nothing is left for train or val, or
        for the test split of all images.
        """
        new_rows = np.cumsum(usable) - 1
        train, val, test = (new_rows[rows[usable[rows]]] for rows in self[:3])
        kept = self._replace(train=train, val=val, test=test)
        _check_sizes(kept, int(usable.sum()))
        return kept


def make_splits(records: Records, root: Path, data: DataSection) -> Splits:
    """Split the records as `data.split` says; list files are searched in `root`.

    Raises DataError if list files are missing, name none of the images or share one, if train or
    val is empty, or if two splits share a patient, also in another spelling (`random` only warns).
    """
    given = [f"data.{key}" for key in LIST_NAMES if getattr(data, key) is not None]
    kind = data.split if data.split != "auto" else _automatic(records, root, data, bool(given))
    if given and kind != "official":
        logger.warning("data.split=%s ignores %s", kind, ", ".join(given))
    if kind == "official":
        splits = _official(records, root, data)
    elif kind == "table":
        splits = _by_table(records, data)
    elif kind == "all":
        none = np.empty(0, dtype=np.int64)
        return _with_fraction(records, Splits(none, none, np.arange(len(records)), "all"), data)
    else:
        splits = (_by_patient if kind == "patient" else _at_random)(records, data)
    splits = _with_fraction(records, splits, data)
    _check_sizes(splits, len(records))
    _check_leak(records, splits)
    return splits


def _automatic(records: Records, root: Path, data: DataSection, has_lists: bool) -> str:
    """Choose given lists, else the table's splits, else lists in the root, else patient."""
    found = find_lists(root, data)
    if records.given_split is not None and not has_lists:
        return "table"
    return "official" if has_lists or {"train_list", "test_list"} <= set(found) else "patient"


def _by_table(records: Records, data: DataSection) -> Splits:
    """Take the table's splits; without validation images, draw val from the training images."""
    given = records.given_split
    if given is None:
        raise DataError(
            "data.split=table needs a table with splits: set data.columns.split, give data.csv as"
            " files by split (train, val, test), or set data.split=patient."
        )
    left_out = int((given == "").sum())
    if left_out:
        logger.warning("%d images are in no split of the table and left out", left_out)
    train, val, test = (np.flatnonzero(given == name) for name in SPLIT_NAMES)
    source = "validation of the table"
    if not len(val):
        val, train = _draw_patients(records, train, data.val_fraction, data.split_seed)
        source = f"validation drawn by patient with seed {data.split_seed}"
    return Splits(train, val, test, "table", source)


def _with_fraction(records: Records, splits: Splits, data: DataSection) -> Splits:
    """Keep `data.train_fraction` of the training images, by patient.

    Patients are drawn in one order, so that a smaller fraction is part of a larger one.
    """
    fraction, total = data.train_fraction, len(splits.train)
    if fraction == 1:
        return splits
    if not total:
        text = "data.train_fraction=%g is ignored: the %s split has no training images"
        logger.warning(text, fraction, splits.kind)
        return splits
    # Seeds of their own: test images are drawn with the first, validation images with the second.
    train, _ = _draw_patients(records, splits.train, fraction, data.split_seed + 2)
    if not len(train):
        raise DataError(
            f"data.train_fraction={fraction:g} of {total} training images leaves none. Set"
            f" data.train_fraction={1 / total:.2g} or more."
        )
    part = f"{len(train)} of {total} training images (train_fraction {fraction:g})"
    return splits._replace(train=train, source=", ".join(filter(None, (splits.source, part))))


def _official(records: Records, root: Path, data: DataSection) -> Splits:
    """Split by list files; without a validation list, draw val from the training list."""
    lists = find_lists(root, data)
    if not {"train_list", "test_list"} <= set(lists):
        given = [f"data.{key}" for key in LIST_NAMES if getattr(data, key) is not None]
        if given and records.given_split is not None:
            raise DataError(
                f"lists replace the splits of the table: with {' and '.join(given)},"
                " data.train_list and data.test_list are needed too. Set both, or data.split=table."
            )
        raise DataError(
            f"the official split needs train_val_list.txt and test_list.txt in {root}. Fetch them"
            " from NIH, set data.train_list and data.test_list to such files, or set"
            " data.split=patient."
        )
    listed = {key: _listed_images(records, path) for key, path in lists.items()}
    in_train, in_test = listed["train_list"], listed["test_list"]
    for key in ("train_list", "val_list"):
        if key in lists:
            _check_disjoint(records, listed[key] & in_test, lists[key], lists["test_list"])
    unlisted = int((~np.any(list(listed.values()), axis=0)).sum())
    if unlisted:
        logger.warning("%d images are in no list file and left out", unlisted)
    source = f"{lists['train_list'].name}, {lists['test_list'].name}, validation "
    if "val_list" in lists:
        in_val = listed["val_list"]
        val, train = np.flatnonzero(in_val), np.flatnonzero(in_train & ~in_val)
        source += f"of {lists['val_list'].name}"
    else:
        candidates = np.flatnonzero(in_train)
        val, train = _draw_patients(records, candidates, data.val_fraction, data.split_seed)
        source += f"drawn by patient with seed {data.split_seed}"
    return Splits(train, val, np.flatnonzero(in_test), "official", source)


def _listed_images(records: Records, path: Path) -> np.ndarray:
    """Return which images the list names, bool ``[len(records)]``.

    The list may have paths, names or names without extension; see `NameIndex`.
    """
    names, images = read_list(path), records.table["image"]
    found = names.intersection(images)
    absent = names - found
    if absent:
        index = NameIndex(images)
        matches = {name: index.matching(name) for name in absent}
        found.update(text for texts in matches.values() for text in texts)
        absent = {name for name, texts in matches.items() if not texts}
        _check_depth(images, index, path, absent)
    listed: np.ndarray = images.isin(found).to_numpy(dtype=bool)
    if not listed.any():
        raise DataError(
            f"{path}: names none of the {len(images)} images: it has"
            f" {min(absent, default='nothing')!r}, they have {images.min()!r}. Set list files of"
            " these images, or data.split=patient."
        )
    if absent:
        text = "%s: the CSV lacks %d of %d listed images, first: %s"
        logger.warning(text, path, len(absent), len(names), min(absent))
    return listed


def _check_depth(images: pd.Series, index: NameIndex, path: Path, absent: Set[str]) -> None:
    """Raise DataError if the list has names where only paths tell the images apart."""
    short = {text: parts_of(text) for text in absent}
    short = {text: parts for text, parts in short.items() if len(parts) < index.depth}
    ends = {stem(parts_of(text)[-1]) for text in images} if short else set()
    for text, parts in sorted(short.items()):
        if stem(parts[-1]) in ends:
            raise DataError(
                f"{path}: {text!r} does not tell which image it is: the table has names that differ"
                f" in their folders only. List the paths, as {images.iloc[0]!r}."
            )


def _check_disjoint(records: Records, in_both: np.ndarray, one: Path, other: Path) -> None:
    if in_both.any():
        first = records.table["image"].iloc[int(np.argmax(in_both))]
        raise DataError(
            f"{int(in_both.sum())} images are both in {one} and in {other}, first: {first}."
            " Fix the list files or set data.split=patient."
        )


def _by_patient(records: Records, data: DataSection) -> Splits:
    rows = np.arange(len(records))
    test, rest = _draw_patients(records, rows, data.test_fraction, data.split_seed)
    val_fraction = data.val_fraction / (1.0 - data.test_fraction)
    val, train = _draw_patients(records, rest, val_fraction, data.split_seed + 1)
    return Splits(train, val, test, "patient", f"seed {data.split_seed}")


def _draw_patients(
    records: Records, rows: np.ndarray, fraction: float, seed: int
) -> Tuple[np.ndarray, np.ndarray]:
    """Draw whole patients until they own `fraction` of the rows; return (drawn, left)."""
    patients = records.table["patient"].to_numpy()[rows]
    order, numbers, sizes = np.unique(patients, return_inverse=True, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(order))
    images_before = np.cumsum(sizes[shuffled]) - sizes[shuffled]
    is_drawn = np.zeros(len(order), dtype=bool)
    is_drawn[shuffled[images_before < round(fraction * len(rows))]] = True
    drawn = is_drawn[numbers]
    return rows[drawn], rows[~drawn]


def _at_random(records: Records, data: DataSection) -> Splits:
    order = np.random.default_rng(data.split_seed).permutation(len(records))
    num_val = round(data.val_fraction * len(records))
    num_test = round(data.test_fraction * len(records))
    val, test, train = np.split(order, [num_val, num_val + num_test])
    source = f"seed {data.split_seed}"
    return Splits(np.sort(train), np.sort(val), np.sort(test), "random", source)


def _check_sizes(splits: Splits, total: int) -> None:
    if splits.kind == "table" and not len(splits.train) and len(splits.val) + len(splits.test):
        return  # a table to score, such as Google's labels of 2019; training says that it has none
    for name in ("test",) if splits.kind == "all" else ("train", "val"):
        if len(getattr(splits, name)) == 0:
            raise DataError(
                f"the {splits.kind} split of {total} images leaves none for {name}:"
                f" {describe_sizes(splits)}. Change data.split, data.val_fraction or"
                " data.test_fraction."
            )


def _check_leak(records: Records, splits: Splits) -> None:
    for name, other in (("val", "train"), ("test", "train"), ("test", "val")):
        rows = getattr(splits, name)
        shared = num_sharing_patients(records, rows, getattr(splits, other))
        if shared == 0:
            continue
        text = f"{shared} of {len(rows)} {name} images share a patient with {other}"
        if splits.kind != "random":
            what = "splits of the table" if splits.kind == "table" else "list files"
            advice = f"Fix the {what} or set data.split=patient."
            raise DataError(f"{text}: scores would be too high. {advice}")
        advice = "Use official or patient."
        logger.warning("data.split=random: %s; scores on %s are too high. %s", text, name, advice)
    if records.variant == "table":
        _check_spellings(records, splits)


def _check_spellings(records: Records, splits: Splits) -> None:
    """Treat patients of two splits as shared if only their spelling differs: `7`, `007`, `7.0`."""
    patients = records.table["patient"]
    spelled = {text: re.sub(r"\.0+$", "", text).lstrip("0").lower() for text in patients.unique()}
    if len(set(spelled.values())) == len(spelled):
        return
    for name, other in (("val", "train"), ("test", "train"), ("test", "val")):
        mine, others = (patients.iloc[getattr(splits, part)] for part in (name, other))
        there = {spelled[text]: text for text in others.unique()}
        alike = mine[mine.map(spelled).isin(there) & ~mine.isin(others.unique())]
        if not len(alike):
            continue
        first = alike.iloc[0]
        text = (
            f"{len(alike)} of {len(mine)} {name} images have a patient of {other} in another"
            f" spelling, e.g. {first!r} and {there[spelled[first]]!r}"
        )
        advice = "Write the ids of patients in one way in all tables."
        if splits.kind != "random":
            raise DataError(f"{text}: scores would be too high. {advice}")
        logger.warning("data.split=random: %s; scores on %s are too high. %s", text, name, advice)


def num_sharing_patients(records: Records, rows: np.ndarray, others: np.ndarray) -> int:
    """Count the images among `rows` whose patient also has an image among `others`."""
    patients = records.table["patient"]  # of text, which np.isin compares pair by pair
    return int(patients.iloc[rows].isin(patients.iloc[others].unique()).sum())


def describe_sizes(splits: Splits) -> str:
    """Return the sizes of the splits: ``"train 82198, val 4326, test 25596"``."""
    return ", ".join(f"{name} {len(getattr(splits, name))}" for name in SPLIT_NAMES)


def describe_splits(splits: Splits) -> str:
    """Return kind, source and sizes: ``"random split (seed 7): train 8, ..."``."""
    made = f" ({splits.source})" if splits.source else ""
    return f"{splits.kind} split{made}: {describe_sizes(splits)}"


def split_hash(records: Records, splits: Splits) -> str:
    """Return the SHA-256 of the sorted file names of each split: the split's identity."""
    digest = hashlib.sha256()
    names = records.table["image"].to_numpy()
    for part in SPLIT_NAMES:
        digest.update(f"[{part}]\n".encode())
        digest.update("\n".join(sorted(names[getattr(splits, part)])).encode())
    return digest.hexdigest()
