"""ChestXrayDataset: the images of a split and their labels, a batch at a time."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cxr_vit.data.augment import Augmentation
from cxr_vit.data.nih import Records
from cxr_vit.data.sampler import PADDING
from cxr_vit.data.store import EmptyReader, ImageReader

__all__ = ["Batch", "ChestXrayDataset", "Sample", "collate"]


class Sample(NamedTuple):
    """One image: uint8 ``[1, H, W]``, float32 ``[C]`` of 0 and 1, and its row in the split."""

    image: Tensor
    labels: Tensor
    row: int


class Batch(NamedTuple):
    """What the loader gives an engine.

    `images` uint8 ``[B, 1, H, W]``, normalised and made three-channel on the device; `labels`
    float32 ``[B, C]``; `indices` int64 ``[B]``, rows in the split, -1 for padding (in evaluation).
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    @classmethod
    def zeros(cls, size: int, *, image_size: int, num_classes: int) -> Batch:
        """Make a batch of black images without findings, all padding."""
        return cls(
            torch.zeros(size, 1, image_size, image_size, dtype=torch.uint8),
            torch.zeros(size, num_classes),
            torch.full((size,), PADDING, dtype=torch.int64),
        )

    def padded(self, size: int) -> Batch:
        """Return the batch with padding at its end, `size` samples in all."""
        missing = size - len(self.images)
        if missing == 0:
            return self
        filler = Batch.zeros(
            missing, image_size=self.images.shape[-1], num_classes=self.labels.shape[1]
        )
        return Batch(*(torch.cat(pair) for pair in zip(self, filler)))


class ChestXrayDataset(Dataset[Sample]):
    """The images of one split.

    It is asked for draws: the row of draw d is ``d % len(self)``, its epoch ``d // len(self)``.
    A row is the draw of epoch 0. Draws of `PADDING` at the end of a batch are black images of that
    index: a device compiled for one shape needs full batches, and a score must neither drop nor
    repeat an image.

    Parameters
    ----------
    records
        The split's records.
    images
        Their pixels, in the same order.
    augmentation
        Varies the images of a batch in place, by draw; None leaves them as they are.
    """

    def __init__(
        self, records: Records, images: ImageReader, *, augmentation: Optional[Augmentation] = None
    ) -> None:
        self.records = records
        self.augmentation = augmentation
        self._images = images
        self._labels = torch.from_numpy(records.labels.astype(np.float32))

    @property
    def image_size(self) -> int:
        """Side of an image, pixels."""
        return self._images.image_size

    @property
    def image_names(self) -> List[str]:
        """File names of the images, by row."""
        names: List[str] = self.records.table["image"].tolist()
        return names

    @property
    def num_classes(self) -> int:
        """Number of label columns."""
        return self._labels.shape[1]

    def __len__(self) -> int:
        return len(self.records)

    def images(self, rows: Union[Sequence[int], np.ndarray]) -> np.ndarray:
        """Return images as they are stored, never augmented.

        Parameters
        ----------
        rows
            Rows of the split.

        Returns
        -------
        numpy.ndarray
            uint8 ``[n, H, W]``.
        """
        size = self.image_size
        images = np.empty((len(rows), size, size), dtype=np.uint8)
        self._images.read(np.asarray(rows, dtype=np.int64), images)
        return images

    def without_images(self) -> ChestXrayDataset:
        """Return the same rows and labels with images of no pixels, ``[n, 1, 0, 0]``.

        For a process that computes without them: nothing is read.
        """
        return ChestXrayDataset(self.records, EmptyReader(len(self)))

    def __getitem__(self, draw: int) -> Sample:
        images, labels, indices = self.__getitems__([draw])
        return Sample(images[0], labels[0], int(indices[0]))

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """Read a batch; torch's loader asks for it this way."""
        numbers = np.asarray(draws, dtype=np.int64)
        count = int((numbers != PADDING).sum())
        assert (numbers[count:] == PADDING).all(), "padding ends a batch"
        numbers = numbers[:count]
        rows = numbers % len(self)
        images = self.images(rows)
        if self.augmentation is not None:
            self.augmentation(images, numbers)
        indices = torch.from_numpy(rows)
        batch = Batch(torch.from_numpy(images).unsqueeze(1), self._labels[indices], indices)
        return batch.padded(len(draws))


def collate(batch: Any) -> Batch:  # torch's types expect a list of samples
    """Leave a batch as the data set gives it; no lambda, as loader processes may be spawned."""
    whole: Batch = batch
    return whole
