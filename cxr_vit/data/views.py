"""The parts of an image that are seen in evaluation."""

from __future__ import annotations

from typing import Dict, NamedTuple, Tuple

import numpy as np


class View(NamedTuple):
    """A square part of an image, or of its mirror image.

    `x` and `y` are its place along each axis: 0 at the left or upper edge, 1 at the opposite one.
    """

    x: float = 0.5
    y: float = 0.5
    is_mirrored: bool = False

    def of(self, images: np.ndarray, size: int) -> np.ndarray:
        """Return this part of images, uint8 ``[n, H, W]``, as ``[n, size, size]``."""
        top, left = (
            _start(place, side, size) for place, side in zip((self.y, self.x), images.shape[1:])
        )
        whole = images[:, :, ::-1] if self.is_mirrored else images
        return np.ascontiguousarray(whole[:, top : top + size, left : left + size])

    def box(self, read_size: int, size: int) -> Tuple[float, float, float, float]:
        """Return the left, upper, right and lower edge of this part, as fractions of the image."""
        left, top = (_start(place, read_size, size) / read_size for place in (self.x, self.y))
        return left, top, left + size / read_size, top + size / read_size


def _start(place: float, side: int, size: int) -> int:
    return int(place * (side - size))


CENTER = View()
_PLACES = ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))

#: `evaluation.views` -> the views whose probabilities are averaged; ten in torchvision's order.
VIEWS: Dict[str, Tuple[View, ...]] = {
    "center": (CENTER,),
    "flip": (CENTER, View(is_mirrored=True)),
    "ten_crop": tuple(View(x, y, mirrored) for mirrored in (False, True) for x, y in _PLACES),
}
