"""A figure of maps over images beside the boxes of their findings."""

from __future__ import annotations

import math
from typing import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cxr_vit.evaluation.localization import Pair

#: Pairs side by side, each of two pictures, and inches of a picture.
_COLUMNS = 3
_INCHES = 2.1


def localization_figure(
    pairs: Sequence[Pair], images: np.ndarray, maps: np.ndarray, hits: np.ndarray, title: str
) -> Figure:
    """Draw each image with the boxes, and again with its map and the place of its maximum.

    Parameters
    ----------
    images
        What the model sees, uint8 ``[N, H, W]``.
    maps
        float ``[N, rows, columns]``, drawn from 0 to the maximum of each.
    hits
        Scores of the pointing game, ``[N]``.
    """
    lines = math.ceil(len(pairs) / _COLUMNS)
    size = (2 * _COLUMNS * _INCHES, lines * (_INCHES + 0.3) + 0.6)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = figure.subplots(lines, 2 * _COLUMNS, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    extent = (0.0, 1.0, 1.0, 0.0)  # shares of the image, as those of the boxes
    for index, (pair, image, values, hit) in enumerate(zip(pairs, images, maps, hits)):
        plain, mapped = axes[2 * index : 2 * index + 2]
        for axis in (plain, mapped):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent)
            for left, top, right, low in pair.boxes:
                box = Rectangle((left, top), right - left, low - top, fill=False, edgecolor="cyan")
                axis.add_patch(box)
        highest = max(float(values.max()), np.finfo(np.float32).tiny)
        shown = values / highest
        mapped.imshow(shown, cmap="inferno", vmin=0, vmax=1, alpha=0.55, extent=extent)
        down, across = np.nonzero(shown == shown.max())
        rows, columns = values.shape
        places = (across + 0.5) / columns, (down + 0.5) / rows
        # Seen on dark and on bright.
        mapped.plot(*places, "w+", markersize=10, markeredgewidth=4)
        mapped.plot(*places, "k+", markersize=8, markeredgewidth=1.5)
        plain.set_title(pair.finding, fontsize=9, parse_math=False)
        mapped.set_title("hit" if hit == 1 else "miss" if hit == 0 else "tie", fontsize=9)
    return figure
