"""ChestXrayDataModule: CSV, images and splits put together."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
import pandas as pd

from cxr_vit.config.schema import AugmentSection, DataSection
from cxr_vit.data.augment import Augmentation
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.data.image_source import (
    ImageSource,
    Once,
    images_folder,
    just_call,
    open_image_source,
    store_paths,
    verify,
)
from cxr_vit.data.labels import label_names
from cxr_vit.data.nih import Records, find_boxes, find_csv, find_relabels, read_records
from cxr_vit.data.splits import SPLIT_NAMES, Splits, describe_splits, make_splits, split_hash
from cxr_vit.errors import DataError

__all__ = ["ChestXrayDataModule", "prepare", "verify_cache"]

logger = logging.getLogger(__name__)

_MISSING = "missing"


class ChestXrayDataModule:
    """The data of a run: read, checked for leaks and split when it is made.

    Parameters
    ----------
    data
        The `data` section of the configuration.
    once
        Lets one process of several do what all would do alike.

    Raises
    ------
    DataError
        If the files are missing or not what they should be.
    """

    def __init__(self, data: DataSection, *, once: Once = just_call) -> None:
        self.data = data
        root = Path(data.root)
        self.names: List[str] = label_names(include_no_finding=data.include_no_finding)
        self.csv: Path = find_csv(root, data.csv)
        everything = read_records(
            self.csv,
            include_no_finding=data.include_no_finding,
            boxes=find_boxes(root, data.boxes),
            relabels=find_relabels(root, data.relabels),
        )
        splits = make_splits(everything, root, data)
        self._source = open_image_source(data, everything.table["image"].tolist(), once=once)
        _refuse_unusable(self._source, data, total=len(everything))
        self.skipped: pd.DataFrame = _unusable(self._source)
        usable = ~everything.table["image"].isin(self.skipped["image"]).to_numpy(dtype=bool)
        self.records: Records = everything.take(np.flatnonzero(usable))
        self.splits: Splits = splits.keep(usable)

    def dataset(
        self, split: str, *, augment: Optional[AugmentSection] = None, seed: int = 0
    ) -> ChestXrayDataset:
        """Return the images of a split.

        Parameters
        ----------
        split
            ``"train"``, ``"val"`` or ``"test"``.
        augment, seed
            How images are varied, and the run's seed; None: not at all.

        Raises
        ------
        DataError
            If that split has no images.
        """
        rows = getattr(self.splits, split)
        if len(rows) == 0:
            others = [name for name in SPLIT_NAMES if len(getattr(self.splits, name))]
            raise DataError(
                f"the {self.splits.kind} split has no {split} images. It has: {', '.join(others)}."
            )
        records = self.records.take(rows)
        augmentation = None
        if augment is not None and augment.is_on:
            augmentation = Augmentation(
                augment, num_samples=len(records), image_size=self.data.image_size, seed=seed
            )
        images = self._source.images.select(records.table["image"].tolist())
        return ChestXrayDataset(records, images, augmentation=augmentation)

    def prevalence(self) -> np.ndarray:
        """Return the part of the training images with each label, float64 ``[C]``, never 0 or 1.

        Half an image is added to either side, so that a label without a positive has finite odds.
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

    def warn_if_changed(self, recorded: Mapping[str, Any]) -> List[str]:
        """Warn where the data are not those of a checkpoint's `trainer_state.json`.

        Returns
        -------
        list of str
            The facts that changed.
        """
        facts = self.fingerprint()
        changed = [fact for fact, value in facts.items() if recorded.get(fact) != value]
        for fact in changed:
            logger.warning(
                "the data are not those of the training: %s was %s and is %s",
                fact,
                recorded.get(fact),
                facts[fact],
            )
        if "split_sha256" in changed:
            logger.warning("with another split, images that were trained on may be scored")
        return changed

    def default_split(self) -> str:
        """Return the split to score unless told otherwise: test, else val."""
        return "test" if len(self.splits.test) else "val"

    def describe(self) -> str:
        """Say in two lines what the data are and where the images come from."""
        return (
            f"{len(self.records)} images of {self.records.table['patient'].nunique()} patients from"
            f" {self.csv}, {describe_splits(self.splits)}\n"
            f"images at {self.data.image_size} x {self.data.image_size} from {self._source.place}"
        )


def prepare(data: DataSection) -> str:
    """Build the cache of a configuration, or bring it up to date, and say what it holds.

    Images of no use are written to `skipped.csv` beside it.

    Raises
    ------
    DataError
        If the data are not what they should be, as when training: the cache is whole even then.
    """
    csv, names = _images_of_csv(data)
    source = open_image_source(data, names, renew=True)
    skipped = _unusable(source)
    listed = store_paths(data).pixels.with_name("skipped.csv")
    listed.unlink(missing_ok=True)
    if len(skipped) and listed.parent.is_dir():
        skipped.to_csv(listed, index=False)
    _refuse_unusable(source, data, total=len(names))
    return f"{len(names) - len(skipped)} of {len(names)} images of {csv} are in {source.place}"


def verify_cache(data: DataSection) -> str:
    """Check every image of a configuration's cache and say that all is well.

    Raises
    ------
    DataError
        If there is no cache that fits, or images of it are not what they should be.
    """
    _, names = _images_of_csv(data)
    verified = verify(data, names)
    where = store_paths(data)
    if verified.wrong:
        raise DataError(
            f"{len(verified.wrong)} images of the cache {where.pixels} are wrong:\n"
            f"{_first_ten(verified.wrong)}\n"
            f"Remove {where.index} and run: python -m cxr_vit prepare --config <file>"
        )
    text = f"{where.pixels}: every image has its checksum; {verified.compared} are what their files"
    text += " hold"
    if verified.without_file:
        text += f", {verified.without_file} have no file here to compare with"
    return text


def _images_of_csv(data: DataSection) -> Tuple[Path, List[str]]:
    csv = find_csv(Path(data.root), data.csv)
    return csv, read_records(csv, include_no_finding=False).table["image"].tolist()


def _unusable(source: ImageSource) -> pd.DataFrame:
    """Return the images that cannot be used, columns `image` and `reason`."""
    reasons = {**dict.fromkeys(source.missing, _MISSING), **source.bad}
    return pd.DataFrame({"image": list(reasons), "reason": list(reasons.values())}, dtype=object)


def _refuse_unusable(source: ImageSource, data: DataSection, *, total: int) -> None:
    """Raise DataError unless the configuration says to go on without them; warn then."""
    images = images_folder(data)
    missing, bad = dict.fromkeys(source.missing, _MISSING), source.bad
    problems: List[str] = []
    none_left = len(missing) + len(bad) == total
    if missing and (data.on_missing == "error" or none_left):
        advice = "Set data.root or data.images to the folder that holds them"
        if not none_left:
            advice += ", or data.on_missing=skip to go on without them"
        problems.append(
            f"{len(missing)} of {total} images are missing under {images}:\n"
            f"{_first_ten(missing)}\n{advice}."
        )
    if bad and (data.on_bad_image == "error" or none_left):
        problems.append(
            f"{len(bad)} of {total} images cannot be used:\n{_first_ten(bad)}\n"
            "Mend them, or set data.on_bad_image=skip to go on without them."
        )
    if problems:
        raise DataError("\n".join(problems))
    if missing:
        logger.warning(
            "%d of %d images are missing under %s and left out", len(missing), total, images
        )
    if bad:
        logger.warning(
            "%d of %d images cannot be used and are left out:\n%s",
            len(bad),
            total,
            _first_ten(bad),
        )


def _first_ten(reasons: Mapping[str, str]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:10]]
    if len(reasons) > len(lines):
        lines.append(f"  ... and {len(reasons) - len(lines)} more")
    return "\n".join(lines)
