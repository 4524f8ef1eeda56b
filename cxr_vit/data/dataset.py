"""The images and labels of a split, read one batch at a time."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Union

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.augment import Augmentation
from cxr_vit.data.images import EmptyReader, FileReader, ImageReader
from cxr_vit.data.records import Records
from cxr_vit.data.sampler import PADDING
from cxr_vit.data.views import CENTER, View
from cxr_vit.errors import DataError

#: Where this process, if it is a loader's, writes its id and the row that it reads.
_report: Optional[np.ndarray] = None


def report_to(entry: Tensor) -> None:
    """Let this process write its id and the rows that it reads into shared memory, int64 ``[2]``.

    The row is `PADDING` while it reads no image.
    """
    global _report
    _report = entry.numpy()
    _report[:] = os.getpid(), PADDING


def _report_row(row: int) -> None:
    if _report is not None:
        _report[1] = row


class Sample(NamedTuple):
    """One image: uint8 ``[1, H, W]``, float32 ``[C]`` of 0, 1 or `UNKNOWN`, and its row."""

    image: Tensor
    labels: Tensor
    row: int


class Batch(NamedTuple):
    """A host batch, as a loader yields it to an engine."""

    images: Tensor  # uint8 [B, 1, H, W]; normalised and made three-channel on the device
    labels: Tensor  # float32 [B, C], 0, 1 or -1 (unknown)
    indices: Tensor  # int64 [B], row in the split; -1 marks padding (evaluation only)

    @classmethod
    def zeros(cls, size: int, *, image_size: int, num_classes: int) -> Batch:
        """Return a batch of padding: black images without findings."""
        return cls(
            torch.zeros(size, 1, image_size, image_size, dtype=torch.uint8),
            torch.zeros(size, num_classes),
            torch.full((size,), PADDING, dtype=torch.int64),
        )

    def padded(self, size: int) -> Batch:
        """Return the batch with padding appended, `size` samples in all."""
        missing = size - len(self.images)
        if missing == 0:
            return self
        side, num_classes = self.images.shape[-1], self.labels.shape[1]
        filler = Batch.zeros(missing, image_size=side, num_classes=num_classes)
        return Batch(*(torch.cat(pair) for pair in zip(self, filler)))


class ChestXrayDataset(Dataset[Sample]):
    """The images of one split, indexed by draw.

    Draw d is row ``d % len(self)`` in epoch ``d // len(self)``, so a row is also its draw of epoch
    0. Draws of `PADDING` may end a batch and give black images of index -1: a device compiled for
    one shape needs full batches, and a score must neither drop nor repeat an image.

    `reader` reads the images in the order of the records. Of larger ones than `image_size`, `view`
    is seen, or the part that `augmentation` draws.
    """

    def __init__(
        self,
        records: Records,
        reader: ImageReader,
        *,
        augmentation: Optional[Augmentation] = None,
        image_size: Optional[int] = None,
        view: View = CENTER,
    ) -> None:
        self.records = records
        self.augmentation = augmentation
        self.view = view
        #: Side of an image as the model sees it, pixels.
        self.image_size = reader.image_size if image_size is None else image_size
        self._reader = reader
        self._labels = torch.from_numpy(records.labels.astype(np.float32))

    @property
    def image_names(self) -> List[str]:
        """File names of the images, by row."""
        return list(self.records.table["image"])

    @property
    def labels(self) -> Tensor:
        """Labels by row, float32 ``[N, C]``."""
        return self._labels

    @property
    def num_classes(self) -> int:
        """Number of label columns."""
        return self._labels.shape[1]

    def __len__(self) -> int:
        return len(self.records)

    def read_images(self, rows: Union[Sequence[int], np.ndarray]) -> np.ndarray:
        """Return the whole images of these rows, uint8 ``[n, H, W]``."""
        size = self._reader.image_size
        images = np.empty((len(rows), size, size), dtype=np.uint8)
        numbers = np.asarray(rows, dtype=np.int64)
        # Files are read one by one, so that the one that hangs or ends the process is known.
        step = 1 if isinstance(self._reader, FileReader) else max(1, len(numbers))
        for start in range(0, len(numbers), step):
            part = slice(start, start + step)
            _report_row(int(numbers[start]))
            self._reader.read(numbers[part], images[part])
        _report_row(PADDING)
        return images

    def describe(self, row: int) -> str:
        """Return the name of an image and where it is read from, for messages."""
        return f"{self.records.table['image'].iloc[row]} ({self._reader.source(row)})"

    def without_images(self) -> ChestXrayDataset:
        """Return the rows and labels with empty images ``[n, 1, 0, 0]``, which are not read."""
        return ChestXrayDataset(self.records, EmptyReader(len(self)))

    def seen_from(self, view: View) -> ChestXrayDataset:
        """Return the same images, not augmented, of which another part is seen."""
        other = copy.copy(self)  # which may be of another class
        other.augmentation, other.view = None, view
        return other

    def __getitem__(self, draw: int) -> Sample:
        images, labels, indices = self.__getitems__([draw])
        return Sample(images[0], labels[0], int(indices[0]))

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """Read a batch; torch's loader calls this instead of `__getitem__`."""
        numbers = np.asarray(draws, dtype=np.int64)
        count = int((numbers != PADDING).sum())
        assert (numbers[count:] == PADDING).all(), "padding must end the batch"
        numbers = numbers[:count]
        rows = numbers % len(self)
        images = self.read_images(rows)
        if self.augmentation is not None:
            images = self.augmentation(images, numbers)
        else:
            images = self.view.of(images, self.image_size)
        indices = torch.from_numpy(rows)
        batch = Batch(torch.from_numpy(images).unsqueeze(1), self._labels[indices], indices)
        return batch.padded(len(draws))


def dataset_of_files(
    paths: Sequence[Union[str, Path]],
    *,
    num_classes: int,
    data: DataSection,
) -> ChestXrayDataset:
    """Return the images of some files, in this order, with labels of zero.

    They are read and cut as `data` says. Raises DataError if a file is missing, or none is given.
    """
    names = [str(path) for path in paths]
    if not names:
        raise DataError("no images: give the path of one or more.")
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"no such image: {missing[0]}{more}. Correct the path.")
    files = {name: name for name in names}
    reader = FileReader(
        files,
        names,
        image_size=data.read_size,
        max_megapixels=data.max_megapixels,
        resample=data.resample,
        dicom_window=data.dicom_window,
    )
    table = pd.DataFrame({"image": names}, dtype=object)  # a name may be no UTF-8
    records = Records(table, np.zeros((len(names), num_classes), np.uint8))
    return ChestXrayDataset(records, reader, image_size=data.image_size)


class PixelReader(ImageReader):
    """Images that are in memory, uint8 ``[n, H, H]``."""

    def __init__(self, images: np.ndarray) -> None:
        super().__init__(images.shape[1])
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def select(self, names: Sequence[str]) -> PixelReader:
        """Return a reader of the images whose rows, as texts, are the names."""
        return PixelReader(self._images[[int(name) for name in names]])

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy images."""
        out[:] = self._images[rows]


def dataset_of_pixels(images: np.ndarray, *, num_classes: int, image_size: int) -> ChestXrayDataset:
    """Return a data set of images in memory, uint8 ``[n, H, H]``, with labels of zero."""
    table = pd.DataFrame({"image": [str(row) for row in range(len(images))]}, dtype=object)
    records = Records(table, np.zeros((len(images), num_classes), np.uint8))
    return ChestXrayDataset(records, PixelReader(images), image_size=image_size)


def collate(batch: Any) -> Batch:  # torch's types expect a list of samples
    """Return the batch of `__getitems__` unchanged; a function, as spawned loaders pickle it."""
    whole: Batch = batch
    return whole
