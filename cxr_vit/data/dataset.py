"""ChestXrayDataset: the films of a split and their labels, a batch at a time."""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cxr_vit.data.augment import Augmentation
from cxr_vit.data.films import Films
from cxr_vit.data.records import Records

__all__ = ["PADDING", "Batch", "ChestXrayDataset", "PaddedCollate", "Sample"]

#: The index of a sample that only fills up a batch.
PADDING = -1


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
    """The films of one split.

    It is asked for draws: the row of draw d is ``d % len(self)``, its epoch ``d // len(self)``.
    A row is the draw of epoch 0.

    Parameters
    ----------
    records
        The split's records.
    films
        Their pixels, in the same order.
    augmentation
        Varies the films of a batch in place, by draw; None leaves them as they are.
    """

    def __init__(
        self, records: Records, films: Films, *, augmentation: Optional[Augmentation] = None
    ) -> None:
        self.records = records
        self.augmentation = augmentation
        self._films = films
        self._labels = torch.from_numpy(records.labels.astype(np.float32))

    @property
    def image_size(self) -> int:
        """Side of a film, pixels."""
        return self._films.image_size

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
        return len(self.records)

    def films(self, rows: Union[Sequence[int], np.ndarray]) -> np.ndarray:
        """Return films as they are stored, never augmented.

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
        films = np.empty((len(rows), size, size), dtype=np.uint8)
        self._films.read(np.asarray(rows, dtype=np.int64), films)
        return films

    def __getitem__(self, draw: int) -> Sample:
        images, labels, indices = self.__getitems__([draw])
        return Sample(images[0], labels[0], int(indices[0]))

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """Read a batch; torch's loader asks for it this way."""
        numbers = np.asarray(draws, dtype=np.int64)
        rows = numbers % len(self)
        images = self.films(rows)
        if self.augmentation is not None:
            self.augmentation(images, numbers)
        indices = torch.from_numpy(rows)
        return Batch(torch.from_numpy(images).unsqueeze(1), self._labels[indices], indices)


class PaddedCollate:
    """Fills a batch up with black films of index -1.

    A device compiled for one shape needs full batches; a score must neither drop nor repeat a film.
    (A class and not a closure: loader processes may be spawned, which pickles it.)

    Parameters
    ----------
    batch_size
        The size to fill up to; None leaves batches as they come.
    """

    def __init__(self, batch_size: Optional[int]) -> None:
        self.batch_size = batch_size

    def __call__(self, batch: Any) -> Batch:  # torch's types expect a list of samples
        """Fill the batch up."""
        return batch if self.batch_size is None else batch.padded(self.batch_size)
