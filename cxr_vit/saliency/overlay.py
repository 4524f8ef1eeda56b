"""Pictures of maps over their images."""

from __future__ import annotations

from typing import Tuple

import numpy as np
from matplotlib import colormaps
from PIL import Image

#: Longest side of a picture; larger images are shrunk, pixels.
LARGEST_SIDE = 1024
#: Of matplotlib: dark where the map is low, as the image is, to bright yellow; also in gray its
#: order is that of the values.
_COLOURS = "inferno"
#: How much of the image the largest value hides.
_OPACITY = 0.65
#: Between two pictures, as a fraction of the width of one.
_GAP = 1 / 64


def overlay(
    image: Image.Image, values: np.ndarray, box: Tuple[float, float, float, float]
) -> Image.Image:
    """Return an image in gray, at its own aspect, with a map over it in colours.

    Colour and opacity are the map's values, interpolated linearly between the middles of the
    patches and divided by the largest; an image whose map is 0 everywhere, and what is outside of
    the map, stays gray.

    Parameters
    ----------
    values
        A map, float ``[rows, columns]``, 0 or more.
    box
        Left, upper, right and lower edge of the map, as fractions of the image (`View.box`).

    Returns
    -------
    A picture of mode RGB, with no side beyond `LARGEST_SIDE`.
    """
    gray = image.convert("L")
    gray.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    strength = _spread(values / max(float(values.max()), 1e-30), box, gray.size)[..., None]
    colours = colormaps[_COLOURS](strength[..., 0])[..., :3]
    pixels = np.asarray(gray, dtype=np.float32)[..., None] / 255.0
    mixed = pixels + _OPACITY * strength * (colours - pixels)
    return Image.fromarray(np.round(255.0 * mixed).astype(np.uint8))


def _spread(
    values: np.ndarray, box: Tuple[float, float, float, float], size: Tuple[int, int]
) -> np.ndarray:
    """Interpolate a map for each pixel of an image of some width and height; 0 outside of it."""
    (width, height), (rows, columns) = size, values.shape
    left, top, right, bottom = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    across, down = columns / (right - left), rows / (bottom - top)
    # From the place of a pixel to that in the map.
    places = (across, 0.0, -left * across, 0.0, down, -top * down)
    patches = Image.fromarray(values.astype(np.float32))
    spread = patches.transform(
        size, Image.Transform.AFFINE, places, resample=Image.Resampling.BILINEAR
    )
    return np.asarray(spread)


def beside(image: Image.Image, covered: Image.Image) -> Image.Image:
    """Return a picture of an image, in gray at the size of its overlay, and the overlay."""
    width, height = covered.size
    gap = max(1, round(_GAP * width))
    picture = Image.new("RGB", (2 * width + gap, height), "white")
    picture.paste(image.convert("L").resize(covered.size), (0, 0))
    picture.paste(covered, (width + gap, 0))
    return picture
