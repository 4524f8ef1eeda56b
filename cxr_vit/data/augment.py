"""Augmentation of whole batches of 8-bit images.

All that moves pixels is one affine map an image, and all that changes gray levels one table of 256
entries, so the cost does not grow with what is switched on. Both are pure functions of (seed,
epoch, row): any number of loader processes, and a resumed run, give the same images. Imports no
torch; OpenCV only where something is switched on.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from cxr_vit.config.schema import AugmentSection

__all__ = ["Augmentation"]

#: What is drawn for an image, each evenly from [0, 1).
_DRAWN = (
    "rotation",
    "shift_x",
    "shift_y",
    "scale",
    "crop_area",
    "crop_ratio",
    "crop_x",
    "crop_y",
    "brightness",
    "contrast",
    "gamma",
    "flip",
)
#: Keeps these numbers apart from those of the sample order, which has the same seed.
_STREAM = 0xA0


class Augmentation:
    """Varies images in place.

    Parameters
    ----------
    section
        The `augment` section.
    num_samples
        Size of the training split.
    image_size
        Side of an image, pixels.
    seed
        The run's seed.
    """

    def __init__(
        self, section: AugmentSection, *, num_samples: int, image_size: int, seed: int
    ) -> None:
        self.section = section
        self.num_samples = num_samples
        self.image_size = image_size
        self.seed = seed
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, images: np.ndarray, draws: np.ndarray) -> None:
        """Vary a batch.

        Parameters
        ----------
        images
            uint8 ``[n, H, W]``, changed in place.
        draws
            int64 ``[n]``, which image in which epoch each is (see `sampler`).
        """
        cv2 = _opencv()
        numbers = self._numbers(draws)
        section = self.section
        # Made first: contrast is about the mean of the image as it is.
        tables = self.tables(numbers, images) if section.recolours else None
        if section.moves:
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            # What comes into view is black; the edge of a crop is not mixed with it.
            border = cv2.BORDER_CONSTANT if section.shows_beyond else cv2.BORDER_REPLICATE
            for image, matrix in zip(images, self.matrices(numbers)):
                image[...] = cv2.warpAffine(
                    image, matrix, image.shape[::-1], flags=flags, borderMode=border
                )
        if tables is not None:
            for image, table in zip(images, tables):
                cv2.LUT(image, table, dst=image)

    def _numbers(self, draws: np.ndarray) -> np.ndarray:
        """Return what was drawn for each image, float32 ``[n, len(_DRAWN)]`` of 0..1."""
        epochs, rows = np.divmod(draws, self.num_samples)
        numbers = np.empty((len(draws), len(_DRAWN)), dtype=np.float32)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = self._epoch(int(epoch))[rows[here]]
        return numbers

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            random = np.random.default_rng((self.seed, epoch, _STREAM))
            self._epochs[epoch] = random.random((self.num_samples, len(_DRAWN)), dtype=np.float32)
            if len(self._epochs) > 2:  # a batch looks at its own epoch and seldom at the next
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def matrices(self, numbers: np.ndarray) -> np.ndarray:
        """Return where each pixel of the varied image comes from.

        Parameters
        ----------
        numbers
            float32 ``[n, 12]`` of 0..1.

        Returns
        -------
        numpy.ndarray
            float64 ``[n, 2, 3]``: pixel of the varied image -> pixel of the image, (x, y).
        """
        section = self.section
        drawn = dict(zip(_DRAWN, numbers.T.astype(np.float64)))
        angle = np.deg2rad(section.rotation) * _either_way(drawn["rotation"])
        zoom = 1 + section.scale * _either_way(drawn["scale"])
        shift = section.shift * _either_way(np.stack([drawn["shift_x"], drawn["shift_y"]]))
        width, height, left, top = self._crops(drawn)
        flip = np.where(drawn["flip"] < section.horizontal_flip, -1.0, 1.0)
        # Backwards, about the image's middle, in parts of its side: flip, crop, then undo the
        # shift, the zoom and the rotation.
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        x, y = left - shift[0], top - shift[1]
        linear = np.stack([cos * width * flip, sin * height, -sin * width * flip, cos * height], -1)
        offset = np.stack([cos * x + sin * y, -sin * x + cos * y], -1) * self.image_size
        linear = linear.reshape(-1, 2, 2)
        middle = np.full(2, (self.image_size - 1) / 2)
        return np.concatenate([linear, (offset + middle - linear @ middle)[..., None]], -1)

    def _crops(self, drawn: Any) -> Any:
        """Return width, height and the middle (x, y) of the crops, parts of the image's side."""
        area = 1 - (1 - self.section.crop) * drawn["crop_area"]
        ratio = self.section.crop_ratio ** (_either_way(drawn["crop_ratio"]) / 2)
        # No wider than the image: the least area is kept then by as much more height.
        ratio = np.clip(ratio, np.sqrt(area), 1 / np.sqrt(area))
        width, height = np.sqrt(area) * ratio, np.sqrt(area) / ratio
        left, top = (
            (1 - side) / 2 * _either_way(drawn[place])
            for side, place in ((width, "crop_x"), (height, "crop_y"))
        )
        return width, height, left, top

    def tables(self, numbers: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return the new gray level of each gray level, an image a row.

        Parameters
        ----------
        numbers
            float32 ``[n, 12]`` of 0..1.
        images
            uint8 ``[n, H, W]``: contrast changes about an image's mean.

        Returns
        -------
        numpy.ndarray
            uint8 ``[n, 256]``.
        """
        section = self.section
        columns = {name: numbers[:, [place]] for place, name in enumerate(_DRAWN)}
        brightness = 1 + section.brightness * _either_way(columns["brightness"])
        contrast = 1 + section.contrast * _either_way(columns["contrast"])
        gamma = 1 + section.gamma * _either_way(columns["gamma"])
        mean = brightness * images.mean(axis=(1, 2), dtype=np.float32)[:, None] / 255
        levels = brightness * np.linspace(0, 1, 256, dtype=np.float32)
        levels = np.clip(mean + contrast * (levels - mean), 0, 1) ** gamma
        return np.round(255 * levels).astype(np.uint8)


def _either_way(numbers: np.ndarray) -> np.ndarray:
    """Stretch 0..1 to -1..1."""
    return 2 * numbers - 1


def _opencv() -> Any:
    """Import OpenCV; it works in the calling thread, as a forked loader process has no other."""
    import cv2

    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)
    return cv2
