"""ChestXrayDataset: films straight from their files, and their labels."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cxr_vit.data.images import read_gray
from cxr_vit.data.records import Records

__all__ = ["Batch", "ChestXrayDataset", "PaddedCollate", "Sample"]


class Sample(NamedTuple):
    """One film: uint8 ``[1, H, W]``, float32 ``[C]`` of 0 and 1, and its row in the split."""

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
        """Make a batch of black films without findings, all padding."""
        return cls(
            torch.zeros(size, 1, image_size, image_size, dtype=torch.uint8),
            torch.zeros(size, num_classes),
            torch.full((size,), -1, dtype=torch.int64),
        )


class ChestXrayDataset(Dataset[Sample]):
    """The films of one split.

    Parameters
    ----------
    records
        The split's records; `path` must be filled.
    image_size
        Side of the square the films are resized to, pixels.
    """

    def __init__(self, records: Records, *, image_size: int) -> None:
        self.records = records
        self.image_size = image_size
        # Plain lists and tensors: a pandas look-up costs more than the read of a small film.
        self._paths: List[str] = records.table["path"].tolist()
        self._labels = torch.from_numpy(records.labels.astype(np.float32))

    @property
    def image_names(self) -> List[str]:
        """File names of the films, by row."""
        names: List[str] = self.records.table["image"].tolist()
        return names

    @property
    def num_classes(self) -> int:
        """Number of label columns."""
        return self._labels.shape[1]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> Sample:
        pixels = read_gray(self._paths[row], self.image_size)
        return Sample(torch.from_numpy(pixels).unsqueeze(0), self._labels[row], row)

    def __getitems__(self, rows: Sequence[int]) -> List[Sample]:
        """Read many films; torch's loader asks for a batch this way."""
        return [self[row] for row in rows]


class PaddedCollate:
    """Makes a batch of samples, filled up with zero films of index -1.

    A device compiled for one shape needs full batches; a score must neither drop nor repeat a film.
    (A class and not a closure: loader processes may be spawned, which pickles it.)

    Parameters
    ----------
    batch_size
        The size to fill up to; None leaves batches as they come.
    """

    def __init__(self, batch_size: Optional[int]) -> None:
        self.batch_size = batch_size

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Stack the samples."""
        images = torch.stack([sample.image for sample in samples])
        labels = torch.stack([sample.labels for sample in samples])
        indices = torch.tensor([sample.row for sample in samples], dtype=torch.int64)
        missing = 0 if self.batch_size is None else self.batch_size - len(samples)
        if missing == 0:
            return Batch(images, labels, indices)
        filler = Batch.zeros(missing, image_size=images.shape[-1], num_classes=labels.shape[1])
        return Batch(*(torch.cat(pair) for pair in zip((images, labels, indices), filler)))
