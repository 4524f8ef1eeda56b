"""Augmentation of whole batches of 8-bit images.

All geometric changes of an image, also cutting a part out of a larger one, are combined into one
affine map, and all changes of its gray levels into one table of 256 entries, so the cost does not
depend on how many are switched on. The operations of RandAugment follow. All are pure functions of
(seed, epoch, row): any number of loader processes and a resumed run give the same images. OpenCV is
imported only if something is switched on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Dict, Optional, Tuple

import numpy as np

from cxr_vit.config.data_sections import AugmentSection
from cxr_vit.data import rand_augment

#: Random numbers per image, each uniform in [0, 1). Their order and their count are part of the
#: result: with another name, also at the end, all images are augmented differently.
_DRAWN = (
    "rotation", "shift_x", "shift_y", "scale", "crop_area", "crop_ratio", "crop_x", "crop_y",
    "brightness", "contrast", "gamma", "flip",
)  # fmt: skip

_INTERPOLATION = {"bilinear": "INTER_LINEAR", "bicubic": "INTER_CUBIC"}

#: Separates these numbers from the sample order, which uses the same seed.
_STREAM = 0xA0


@lru_cache(maxsize=2)  # a batch needs its own epoch and rarely the next
def _epoch_numbers(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    random = np.random.default_rng((seed, epoch, _STREAM))
    return random.random((num_samples, len(_DRAWN)), dtype=np.float32)


@dataclass(eq=False)
class Augmentation:
    """Changes batches of images."""

    section: AugmentSection
    num_samples: int  # size of the training split
    image_size: int  # side of a new image, pixels
    seed: int  # of the run
    read_size: Optional[int] = None  # side of an original image; None: `image_size`

    def __call__(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return new images, uint8 ``[n, H, W]``, for their draws, int64 ``[n]`` (see `sampler`).

        The originals may be changed.
        """
        cv2 = _opencv()
        numbers = self._numbers(draws)
        section = self.section
        # Computed first: contrast changes about the mean of the original image.
        tables = self.tables(numbers, images) if section.recolours else None
        if section.moves or self.read_side > self.image_size:
            flags = getattr(cv2, _INTERPOLATION[section.interpolation]) | cv2.WARP_INVERSE_MAP
            # Pixels from outside the image are black; a crop's edge must not be mixed with black.
            border = cv2.BORDER_CONSTANT if section.shows_beyond else cv2.BORDER_REPLICATE
            size, originals = (self.image_size, self.image_size), images
            images = np.empty((len(images), *size), dtype=np.uint8)
            for original, image, matrix in zip(originals, images, self.matrices(numbers)):
                cv2.warpAffine(original, matrix, size, dst=image, flags=flags, borderMode=border)
        if tables is not None:
            for image, table in zip(images, tables):
                cv2.LUT(image, table, dst=image)
        if section.rand_augment:
            how = {"num_samples": self.num_samples, "seed": self.seed}
            rand_augment.apply_to(images, draws, section, **how)
        return images

    @property
    def read_side(self) -> int:
        """Side of an original image, pixels."""
        return self.image_size if self.read_size is None else self.read_size

    def _numbers(self, draws: np.ndarray) -> np.ndarray:
        """Return the random numbers of each draw, float32 ``[n, len(_DRAWN)]`` in [0, 1)."""
        epochs, rows = np.divmod(draws, self.num_samples)
        numbers = np.empty((len(draws), len(_DRAWN)), dtype=np.float32)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = _epoch_numbers(self.num_samples, self.seed, int(epoch))[rows[here]]
        return numbers

    def matrices(self, numbers: np.ndarray) -> np.ndarray:
        """Return the affine map of each image, from pixels of the new image to the original.

        `numbers` are those of `_numbers`; the result is float64 ``[n, 2, 3]``, for pixels
        (x, y, 1).
        """
        section = self.section
        drawn = dict(zip(_DRAWN, numbers.T.astype(np.float64)))
        angle = np.deg2rad(section.rotation) * _symmetric(drawn["rotation"])
        zoom = 1 + section.scale * _symmetric(drawn["scale"])
        shift = section.shift * _symmetric(np.stack([drawn["shift_x"], drawn["shift_y"]]))
        width, height, left, top = self._crops(drawn)
        flip = np.where(drawn["flip"] < section.horizontal_flip, -1.0, 1.0)
        # The inverse map, about the center, in units of the side: flip and crop, then undo the
        # shift, the zoom and the rotation.
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        x, y = left - shift[0], top - shift[1]
        linear = np.stack([cos * width * flip, sin * height, -sin * width * flip, cos * height], -1)
        offset = np.stack([cos * x + sin * y, -sin * x + cos * y], -1) * self.read_side
        linear = linear.reshape(-1, 2, 2) * (self.read_side / self.image_size)
        center, new_center = ((size - 1) / 2 for size in (self.read_side, self.image_size))
        shifted = offset + center - linear @ np.full(2, new_center)
        return np.concatenate([linear, shifted[..., None]], -1)

    def _crops(
        self, drawn: Dict[str, np.ndarray]
    ) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return width, height and center (x, y) of the crops, in units of the image's side.

        Without random crops they are whole images, or parts of `image_size` at whole pixels.
        """
        if self.section.crop == 1 and self.read_side > self.image_size:
            room = self.read_side - self.image_size
            side = np.full(len(drawn["flip"]), self.image_size / self.read_side)
            left, top = (np.floor(drawn[name] * (room + 1)) for name in ("crop_x", "crop_y"))
            return side, side, *((place - room / 2) / self.read_side for place in (left, top))
        area = 1 - (1 - self.section.crop) * drawn["crop_area"]
        ratio = self.section.crop_ratio ** (_symmetric(drawn["crop_ratio"]) / 2)
        # No side is longer than the image's; the area is kept.
        ratio = np.clip(ratio, np.sqrt(area), 1 / np.sqrt(area))
        width, height = np.sqrt(area) * ratio, np.sqrt(area) / ratio
        x = (1 - width) / 2 * _symmetric(drawn["crop_x"])
        y = (1 - height) / 2 * _symmetric(drawn["crop_y"])
        return width, height, x, y

    def tables(self, numbers: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return the new gray level of each gray level per image, uint8 ``[n, 256]``.

        `numbers` are those of `_numbers`, `images` uint8 ``[n, H, W]``; contrast changes about the
        mean of the image.
        """
        section = self.section
        drawn = {name: numbers[:, [column]] for column, name in enumerate(_DRAWN)}
        brightness = 1 + section.brightness * _symmetric(drawn["brightness"])
        contrast = 1 + section.contrast * _symmetric(drawn["contrast"])
        gamma = 1 + section.gamma * _symmetric(drawn["gamma"])
        mean = brightness * images.mean(axis=(1, 2), dtype=np.float32)[:, None] / 255
        levels = brightness * np.linspace(0, 1, 256, dtype=np.float32)
        levels = np.clip(mean + contrast * (levels - mean), 0, 1) ** gamma
        return np.round(255 * levels).astype(np.uint8)


def _symmetric(numbers: np.ndarray) -> np.ndarray:
    """Map [0, 1) to [-1, 1)."""
    return 2 * numbers - 1


def _opencv() -> Any:
    """Import OpenCV without its thread pool, which forked loader processes lack."""
    import cv2

    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)
    return cv2
