"""ChestXrayDataModule: CSV, images and splits put together."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping

import numpy as np

from cxr_vit.config.schema import DataSection
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.data.images import find_images
from cxr_vit.data.labels import label_names
from cxr_vit.data.records import Records, find_csv, read_records
from cxr_vit.data.sample import write_sample
from cxr_vit.data.splits import SPLIT_NAMES, Splits, describe_sizes, make_splits, split_hash
from cxr_vit.errors import DataError

__all__ = ["ChestXrayDataModule"]

logger = logging.getLogger(__name__)


class ChestXrayDataModule:
    """The data of a run: read, checked for leaks and split when it is made.

    Parameters
    ----------
    data
        The `data` section of the configuration.
    may_write_sample
        Whether a root that does not exist may be filled with synthetic films
        (`data.sample_images`); not when scoring, where it would hide a wrong path.

    Raises
    ------
    DataError
        If the files are missing or not what they should be.
    """

    def __init__(self, data: DataSection, *, may_write_sample: bool = True) -> None:
        self.data = data
        root = Path(data.root)
        if may_write_sample and data.sample_images is not None and not root.exists():
            logger.warning(
                "data.root=%s does not exist: writing a synthetic data set there (%d films, none of"
                " them real; data.sample_images)",
                root,
                data.sample_images,
            )
            write_sample(root, num_images=data.sample_images)
        images = root if data.images is None else Path(data.images)
        self.names: List[str] = label_names(include_no_finding=data.include_no_finding)
        self.csv: Path = find_csv(root, data.csv)
        self.records: Records = read_records(
            self.csv,
            find_images(images),
            include_no_finding=data.include_no_finding,
            on_missing=data.on_missing,
            root=images,
        )
        self.splits: Splits = make_splits(self.records, root, data)

    def dataset(self, split: str) -> ChestXrayDataset:
        """Return the films of ``"train"``, ``"val"`` or ``"test"``.

        Raises
        ------
        DataError
            If that split has no films.
        """
        rows = getattr(self.splits, split)
        if len(rows) == 0:
            others = [name for name in SPLIT_NAMES if len(getattr(self.splits, name))]
            raise DataError(
                f"the {self.splits.kind} split has no {split} films. It has: {', '.join(others)}."
            )
        return ChestXrayDataset(self.records.take(rows), image_size=self.data.image_size)

    def prevalence(self) -> np.ndarray:
        """Return the part of the training films with each label, float64 ``[C]``, never 0 or 1.

        Half a film is added to either side, so that a label without a positive has finite odds.
        """
        labels = self.records.labels[self.splits.train]
        positives = labels.sum(axis=0, dtype=np.int64)
        smoothed: np.ndarray = (positives + 0.5) / (len(labels) + 1.0)
        return smoothed

    def fingerprint(self) -> Dict[str, str]:
        """Return the SHA-256 of the CSV's bytes and of the split."""
        return {
            "csv_sha256": hashlib.sha256(self.csv.read_bytes()).hexdigest(),
            "split_sha256": split_hash(self.records, self.splits),
            "split_kind": self.splits.kind,
        }

    def warn_if_changed(self, recorded: Mapping[str, Any]) -> None:
        """Warn where the data are not those a checkpoint's `trainer_state.json` recorded."""
        for fact, value in self.fingerprint().items():
            if recorded.get(fact) != value:
                logger.warning(
                    "the data are not those of the training: %s was %s and is %s",
                    fact,
                    recorded.get(fact),
                    value,
                )

    def default_split(self) -> str:
        """Return the split to score unless told otherwise: test, else val."""
        return "test" if len(self.splits.test) else "val"

    def describe(self) -> str:
        """Say in a line what the data are."""
        return (
            f"{len(self.records)} films of {self.records.table['patient'].nunique()} patients from"
            f" {self.csv}, {self.splits.kind} split: {describe_sizes(self.splits)}"
        )
