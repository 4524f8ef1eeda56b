"""ChestXrayDataModule: the CSV, the splits and the images of a run, and the cache's commands."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

import numpy as np
import pandas as pd
from torch.utils.data import DataLoader

from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.data.augment import Augmentation
from cxr_vit.data.dataset import ChestXrayDataset, collate
from cxr_vit.data.image_source import (
    ImageSource,
    RunOnce,
    cache_paths,
    images_folder,
    open_image_source,
    plain_images,
    run_here,
    verify,
)
from cxr_vit.data.label_names import label_names
from cxr_vit.data.names import NameIndex
from cxr_vit.data.nih import find_boxes, find_relabels, read_records
from cxr_vit.data.records import UNKNOWN, Records
from cxr_vit.data.sampler import EvaluationSampler, TrainingSampler
from cxr_vit.data.splits import SPLIT_NAMES, Splits, describe_splits, make_splits, split_hash
from cxr_vit.data.synthetic.dataset import write_sample_if_absent
from cxr_vit.data.table import read_table_records
from cxr_vit.data.text_files import find_csv, write_csv
from cxr_vit.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_MISSING = "missing"


class _Content(NamedTuple):
    """What a data module reads."""

    files: List[Path]
    source: ImageSource
    records: Records
    splits: Splits
    skipped: pd.DataFrame


class ChestXrayDataModule:
    """The data of a run: labels, splits and images.

    `setup` reads them; everything that needs them calls it. The constructor reads nothing.

    Attributes
    ----------
    names
        Labels in the order of the columns and of the logits.
    once
        Runs a slow check in one process of several; the trainer sets it.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            if name in vars(cls):
                raise ConfigError(
                    f"{cls.__name__}.{name} is never called: engines read dataset(split) with"
                    " loaders of their own. Override dataset."
                )

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = config.data
        self.names: List[str] = label_names(self.data)
        self.once: RunOnce = run_here
        self._content: Optional[_Content] = None

    def prepare_data(self) -> None:
        """Write the synthetic sample if `data.sample_images` is set and the root does not exist."""
        write_sample_if_absent(self.data)

    def setup(self, stage: Optional[str] = None) -> None:
        """Read the CSV, check it for leaks, split it, and open or build the cache of the images.

        All stages use the same data, and a second call does nothing. Raises DataError if files are
        missing or invalid.
        """
        if self._content is None:
            self.prepare_data()
            self._content = _read(self.data, self.once)

    @property
    def content(self) -> _Content:
        """What `setup` reads."""
        self.setup()
        assert self._content is not None
        return self._content

    @property
    def csv(self) -> Path:
        """The file of the labels, the first of several."""
        return self.content.files[0]

    @property
    def files(self) -> List[Path]:
        """The files of the labels."""
        return self.content.files

    @property
    def records(self) -> Records:
        """All usable images."""
        return self.content.records

    @property
    def splits(self) -> Splits:
        """Rows of `records` by split."""
        return self.content.splits

    @property
    def skipped(self) -> pd.DataFrame:
        """Images left out, columns `image` and `reason`."""
        return self.content.skipped

    def plain_images(self) -> List[str]:
        """Return the images whose pixels are all equal, in the order of the records."""
        plain = set(plain_images(self.content.source))
        return [name for name in self.records.table["image"] if name in plain]

    def dataset(self, split: str, *, augmented: bool = False) -> ChestXrayDataset:
        """Return the images of ``"train"``, ``"val"`` or ``"test"``.

        `augmented` applies `config.augment`, as in training. Raises DataError if the split has no
        images.
        """
        rows = getattr(self.splits, split)
        if len(rows) == 0:
            others = [name for name in SPLIT_NAMES if len(getattr(self.splits, name))]
            raise DataError(
                f"the {self.splits.kind} split has no {split} images. It has: {', '.join(others)}."
            )
        records = self.records.take(rows)
        augmentation, size = None, self.data.image_size
        if augmented and (self.config.augment.is_on or self.data.read_size > size):
            augmentation = Augmentation(
                self.config.augment,
                num_samples=len(records),
                image_size=size,
                seed=self.config.run.seed,
                read_size=self.data.read_size,
            )
        reader = self.content.source.reader.select(records.table["image"].tolist())
        return ChestXrayDataset(records, reader, augmentation=augmentation, image_size=size)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the host batches of the first epoch, in the order of the training.

        For looking at the data and for loops of your own. Engines make their own loaders from
        `dataset`: PopTorch has a loader class of its own, and processes read their own replicas.
        """
        dataset = self.dataset("train", augmented=True)
        batch = BatchPlan.from_section(self.config.batch)
        steps = max(1, len(dataset) // batch.global_batch_size)
        sampler = TrainingSampler(
            len(dataset),
            global_batch_size=batch.global_batch_size,
            device_iterations=batch.device_iterations,
            seed=self.config.run.seed,
            start_step=0,
            total_steps=max(1, steps // batch.device_iterations) * batch.device_iterations,
        )
        return self._dataloader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the host batches of the validation images, in order; the last may be shorter."""
        return self._evaluation_dataloader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the host batches of the test images, in order; the last may be shorter."""
        return self._evaluation_dataloader("test")

    def _evaluation_dataloader(self, split: str) -> DataLoader[Any]:
        dataset, batch = self.dataset(split), BatchPlan.from_section(self.config.batch)
        size = batch.eval_host_batch_size
        return self._dataloader(dataset, EvaluationSampler(len(dataset), batch_size=size))

    def _dataloader(
        self, dataset: ChestXrayDataset, sampler: Union[TrainingSampler, EvaluationSampler]
    ) -> DataLoader[Any]:
        workers = self.data.num_workers
        return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate)

    def prevalence(self) -> np.ndarray:
        """Return the fraction of training images with each label, of those where it is known.

        float64 ``[C]``, in (0, 1).

        Half an image is added to either side, so that a label without positives has finite odds.
        """
        labels = self.records.labels[self.splits.train]
        positives = (labels == 1).sum(axis=0)
        smoothed: np.ndarray = (positives + 0.5) / ((labels != UNKNOWN).sum(axis=0) + 1.0)
        return smoothed

    def fingerprint(self) -> Dict[str, str]:
        """Return the SHA-256 of the bytes of the label files and of the split."""
        content = b"".join(path.read_bytes() for path in self.files)
        return {
            "csv_sha256": hashlib.sha256(content).hexdigest(),
            "split_sha256": split_hash(self.records, self.splits),
            "split_kind": self.splits.kind,
        }

    def warn_if_changed(self, recorded: Mapping[str, Any]) -> List[str]:
        """Warn of data other than a `trainer_state.json` records; return the changed facts."""
        facts = self.fingerprint()
        changed = [fact for fact, value in facts.items() if recorded.get(fact) != value]
        for fact in changed:
            text = "the data differ from those of the training: %s was %s and is %s"
            logger.warning(text, fact, recorded.get(fact), facts[fact])
        if "split_sha256" in changed:
            logger.warning("with another split, images of the training may be scored")
        return changed

    def default_split(self) -> str:
        """Return the split that is scored by default: test, or val if test is empty."""
        return "test" if len(self.splits.test) else "val"

    def describe(self) -> str:
        """Return lines: what the data are, where images are read from, how many labels are unknown.

        The last one is left out if all are known.
        """
        size, source = self.data.read_size, self.content.source
        unknown, seen = self._describe_unknown(), self.data.image_size
        part = "" if seen == size else f", of which the model sees {seen} x {seen},"
        return (
            f"{len(self.records)} images of {self.records.table['patient'].nunique()} patients from"
            f" {', '.join(map(str, self.files))}, {describe_splits(self.splits)}\n"
            f"images at {size} x {size}{part} from {source.origin}{unknown}"
        )

    def _describe_unknown(self) -> str:
        """Return a line with the share of unknown labels of each split; empty if there are none."""
        unknown = self.records.labels == UNKNOWN
        rows = {name: getattr(self.splits, name) for name in SPLIT_NAMES}
        if not unknown.any():
            return ""
        shares = [
            f"{name} {100 * unknown[rows[name]].mean():.1f} %" for name in rows if len(rows[name])
        ]
        return f"\nunknown labels, which count in no loss and no score: {', '.join(shares)}"


def _read(data: DataSection, once: RunOnce) -> _Content:
    """Read the records, split them, open the images, and leave the unusable ones out."""
    files, listed = read_listed(data)
    splits = make_splits(listed, Path(data.root), data)
    source = open_image_source(data, listed.table["image"].tolist(), once=once)
    _refuse_unusable(source, data, total=len(listed))
    skipped = _unusable(source)
    usable = ~listed.table["image"].isin(skipped["image"]).to_numpy(dtype=bool)
    records = listed.take(np.flatnonzero(usable))
    return _Content(files, source, records, splits.keep(usable), skipped)


def read_listed(data: DataSection) -> Tuple[List[Path], Records]:
    """Return the label files and all their records, whether or not the images exist."""
    if data.format == "table":
        return read_table_records(data)
    root = Path(data.root)
    csv = find_csv(root, data.csv)
    records = read_records(
        csv,
        include_no_finding=data.include_no_finding,
        boxes=find_boxes(root, data.boxes),
        relabels=find_relabels(root, data.relabels),
        optional=[key for key in ("boxes", "relabels") if getattr(data, key) is None],
    )
    return [csv], records


def training_images(data: DataSection) -> Callable[[str], bool]:
    """Return whether an image, given by name or path, is one to train or to validate with.

    Only the label files and lists are read, not the images; nothing is logged. Raises DataError if
    they are missing or invalid.
    """
    package = logging.getLogger("cxr_vit")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        _, listed = read_listed(data)
        splits = make_splits(listed, Path(data.root), data)
    finally:
        package.setLevel(level)
    names = listed.table["image"]
    index = NameIndex(names)
    trained = set(names.iloc[np.concatenate([splits.train, splits.val])])
    return lambda image: not trained.isdisjoint(index.matching(image))


def prepare(data: DataSection) -> str:
    """Build or update the cache and return one line about its contents.

    Unusable images are written to `skipped.csv` beside it.
    Raises DataError if training would refuse the data. The cache is complete even then.
    """
    csv, names = _listed_images(data)
    source = open_image_source(data, names, renew=True)
    skipped = _unusable(source)
    path = cache_paths(data).pixels.with_name("skipped.csv")
    path.unlink(missing_ok=True)
    if len(skipped) and path.parent.is_dir():
        write_csv(path, skipped)
    _refuse_unusable(source, data, total=len(names))
    return f"{len(names) - len(skipped)} of {len(names)} images of {csv} are in {source.origin}"


def verify_cache(data: DataSection) -> str:
    """Check every image of the cache and return one line about the result.

    Raises DataError if there is no cache that fits, or images in it are wrong.
    """
    _, names = _listed_images(data)
    wrong, compared, without_file = verify(data, names)
    where = cache_paths(data)
    if wrong:
        raise DataError(
            f"{len(wrong)} images of the cache {where.pixels} are wrong:\n{_first_ten(wrong)}\n"
            f"Remove {where.index} and run: python -m cxr_vit prepare --config <file>"
        )
    text = f"{where.pixels}: all checksums match; {compared} images equal their files"
    return text + (f", {without_file} have no file here to compare with" if without_file else "")


def _listed_images(data: DataSection) -> Tuple[Path, List[str]]:
    files, records = read_listed(data)
    return files[0], records.table["image"].tolist()


def _unusable(source: ImageSource) -> pd.DataFrame:
    """Return the unusable images, columns `image` and `reason`."""
    reasons = {**dict.fromkeys(source.missing, _MISSING), **source.bad}
    return pd.DataFrame({"image": list(reasons), "reason": list(reasons.values())}, dtype=object)


def _refuse_unusable(source: ImageSource, data: DataSection, *, total: int) -> None:
    """Raise DataError, or warn if the configuration says to skip unusable images."""
    none_left = len(source.missing) + len(source.bad) == total
    problems: List[str] = []
    if source.missing:
        text = f"{len(source.missing)} of {total} images are missing under {images_folder(data)}"
        if data.on_missing == "error" or none_left:
            listed = _first_ten(dict.fromkeys(source.missing, _MISSING))
            skip = "" if none_left else ", or data.on_missing=skip to leave them out"
            advice = f"Set data.root or data.images to the folder that holds them{skip}."
            problems.append(f"{text}:\n{listed}\n{advice}")
        else:
            logger.warning("%s and left out", text)
    if source.bad:
        text, listed = f"{len(source.bad)} of {total} images are unusable", _first_ten(source.bad)
        if data.on_bad_image == "error" or none_left:
            advice = "Fix them, or set data.on_bad_image=skip to leave them out."
            problems.append(f"{text}:\n{listed}\n{advice}")
        else:
            logger.warning("%s and left out:\n%s", text, listed)
    if problems:
        raise DataError("\n".join(problems))


def _first_ten(reasons: Mapping[str, str]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:10]]
    if len(reasons) > len(lines):
        lines.append(f"  ... and {len(reasons) - len(lines)} more")
    return "\n".join(lines)
