"""Which films train, validate and test: official, by patient, or at random. Imports no torch.

A random split by image puts the same patient on both sides: on the real CSV more than 80 % of the
validation films of a 5 % split share a patient with training, and a network recognises patients.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

import numpy as np

from cxr_vit.config.schema import DataSection
from cxr_vit.data.records import Records
from cxr_vit.errors import DataError

__all__ = ["SPLIT_NAMES", "Splits", "make_splits", "num_sharing_patients", "split_hash"]

logger = logging.getLogger(__name__)

SPLIT_NAMES: Tuple[str, ...] = ("train", "val", "test")
#: Spellings of the official lists: NIH's own and that of the copy at 224 pixels.
_LIST_NAMES = (
    ("train_val_list.txt", "test_list.txt"),
    ("train_val_list_NIH.txt", "test_list_NIH.txt"),
)


class Splits(NamedTuple):
    """Rows of the records in each split, int64 ``[n]`` each, ascending; and how they were made."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    kind: str


def make_splits(records: Records, root: Path, data: DataSection) -> Splits:
    """Split the records as `data.split` says.

    Raises
    ------
    DataError
        If the list files are missing, a split that trains or validates is empty, or a patient is
        in two splits (but for `random`, which only warns).
    """
    lists = _find_lists(root)
    kind = data.split
    if kind == "auto":
        kind = "official" if lists else "patient"
    if kind == "official":
        splits = _official(records, lists, root, data)
    elif kind == "patient":
        splits = _by_patient(records, data)
    else:
        splits = _at_random(len(records), data)
    _check_sizes(splits, len(records))
    _check_leak(records, splits)
    return splits


def _find_lists(root: Path) -> Optional[Tuple[Path, Path]]:
    for train_val, test in _LIST_NAMES:
        if (root / train_val).is_file() and (root / test).is_file():
            return root / train_val, root / test
    return None


def _official(
    records: Records, lists: Optional[Tuple[Path, Path]], root: Path, data: DataSection
) -> Splits:
    """NIH's lists; validation is taken out of the training list, patient by patient."""
    if lists is None:
        raise DataError(
            f"data.split=official needs train_val_list.txt and test_list.txt in {root}."
            " Fetch them from NIH, or set data.split=patient."
        )
    train_val_names, test_names = (_read_list(path) for path in lists)
    names = records.table["image"]
    in_train = names.isin(train_val_names).to_numpy()
    in_test = names.isin(test_names).to_numpy()
    unlisted = int((~in_train & ~in_test).sum())
    if unlisted:
        logger.warning("%d films are in neither official list and left out", unlisted)
    candidates = np.flatnonzero(in_train)
    val, train = _draw_patients(records, candidates, data.val_fraction, data.split_seed)
    return Splits(train, val, np.flatnonzero(in_test), "official")


def _read_list(path: Path) -> Set[str]:
    try:
        return set(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable list of file names ({error}).") from error


def _by_patient(records: Records, data: DataSection) -> Splits:
    everyone = np.arange(len(records))
    test, rest = _draw_patients(records, everyone, data.test_fraction, data.split_seed)
    val, train = _draw_patients(
        records, rest, data.val_fraction / (1.0 - data.test_fraction), data.split_seed + 1
    )
    return Splits(train, val, test, "patient")


def _draw_patients(
    records: Records, rows: np.ndarray, fraction: float, seed: int
) -> Tuple[np.ndarray, np.ndarray]:
    """Draw whole patients until they own `fraction` of the rows; return (drawn, left)."""
    patients = records.table["patient"].to_numpy()[rows]
    order, sizes = np.unique(patients, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(order))
    films_before = np.cumsum(sizes[shuffled]) - sizes[shuffled]
    drawn_patients = order[shuffled[films_before < round(fraction * len(rows))]]
    drawn = np.isin(patients, drawn_patients)
    return rows[drawn], rows[~drawn]


def _at_random(num_records: int, data: DataSection) -> Splits:
    order = np.random.default_rng(data.split_seed).permutation(num_records)
    num_val = round(data.val_fraction * num_records)
    num_test = round(data.test_fraction * num_records)
    val, test, train = np.split(order, [num_val, num_val + num_test])
    return Splits(np.sort(train), np.sort(val), np.sort(test), "random")


def _check_sizes(splits: Splits, total: int) -> None:
    for name in ("train", "val"):
        if len(getattr(splits, name)) == 0:
            raise DataError(
                f"the {splits.kind} split of {total} films leaves none for {name}:"
                f" {describe_sizes(splits)}. Change data.split, data.val_fraction or"
                " data.test_fraction."
            )


def describe_sizes(splits: Splits) -> str:
    """Write the sizes of a split, e.g. ``"train 82198, val 4326, test 25596"``."""
    return ", ".join(f"{name} {len(getattr(splits, name))}" for name in SPLIT_NAMES)


def num_sharing_patients(records: Records, rows: np.ndarray, others: np.ndarray) -> int:
    """Count the films among `rows` whose patient also has a film among `others`."""
    patients = records.table["patient"].to_numpy()
    return int(np.isin(patients[rows], patients[others]).sum())


def _check_leak(records: Records, splits: Splits) -> None:
    parts: Dict[str, np.ndarray] = {name: getattr(splits, name) for name in SPLIT_NAMES}
    pairs: List[Tuple[str, str]] = [("val", "train"), ("test", "train"), ("test", "val")]
    for name, other in pairs:
        shared = num_sharing_patients(records, parts[name], parts[other])
        if shared == 0:
            continue
        text = f"{shared} of {len(parts[name])} {name} films share a patient with {other}"
        if splits.kind != "random":
            raise DataError(
                f"{text}: scores would be flattered. Mend the list files or set data.split=patient."
            )
        logger.warning(
            "data.split=random: %s; scores on %s are flattered. Use official or patient.",
            text,
            name,
        )


def split_hash(records: Records, splits: Splits) -> str:
    """Return the SHA-256 of the file names in each split, sorted: the split's identity."""
    digest = hashlib.sha256()
    names = records.table["image"].to_numpy()
    for part in SPLIT_NAMES:
        digest.update(f"[{part}]\n".encode())
        digest.update("\n".join(sorted(names[getattr(splits, part)])).encode())
    return digest.hexdigest()
