"""How well maps of an image find the boxes of its findings: pointing game and IoU, with intervals.

A map is float ``[rows, columns]``, 0 or more, of the square part of an image that the model sees,
which it divides into equal cells. Boxes are float64 ``[n, 4]``: left, top, right and lower edge as
shares of that part.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.data.nih import IMAGE_PIXELS
from cxr_vit.data.records import BOX_SIDES, Records
from cxr_vit.data.views import CENTER
from cxr_vit.evaluation.bootstrap import LEVEL, Resamples, intervals
from cxr_vit.evaluation.statistics import Statistic, ratios

#: Columns of `map_scores`.
SCORES = ("pointing_game", "iou", "iou_from_0.1", "iou_from_0.3")
_IOU_LEVELS = (0.1, 0.3)
#: Name of the scores of the maps to judge, beside those of the baselines.
MAPS = "maps"
#: Groups of pairs beside the findings: all of them, and the mean of the findings.
ALL, MACRO = "all", "macro"
#: The region of a map is where it has at least this share of its maximum.
_REGION = 0.5
#: Maps of noise for each pair, whose mean scores are the random baseline.
_RANDOM_MAPS = 100
#: Cells along a side of the center's map; odd, so that one is in the middle.
_CENTER_CELLS = 65
#: Where the center's map has half its maximum: share of the side of the seen part.
CENTER_RADIUS = 0.25


class Pair(NamedTuple):
    """A finding on an image, and its boxes on the part that the model sees."""

    row: int
    finding: str
    boxes: np.ndarray


def boxed_pairs(records: Records, *, read_size: int, image_size: int) -> List[Pair]:
    """Return the pairs of image and finding that have a box, by finding, then by row.

    Images are resized to a square of `read_size` pixels, whose middle of `image_size` is seen.
    Boxes are cut off at its edge; those outside it are left out, so that a pair may have none.
    """
    left, top, right, low = CENTER.box(read_size, image_size)
    found = []
    for (finding, row), boxes in records.boxes.groupby(["finding", "row"]):
        corner, size = np.split(boxes[BOX_SIDES].to_numpy(np.float64), 2, axis=1)
        edges = np.concatenate([corner, corner + size], axis=1) / IMAGE_PIXELS
        seen = (edges - [left, top] * 2) / ([right - left, low - top] * 2)
        seen = seen.clip(0.0, 1.0)
        found.append(Pair(int(row), str(finding), seen[(seen[:, 2:] > seen[:, :2]).all(axis=1)]))
    return found


def covered(boxes: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the share of each cell that the union of the boxes covers, float64."""
    x, y = (
        np.unique(np.concatenate([np.linspace(0.0, 1.0, count + 1), boxes[:, axis::2].ravel()]))
        for axis, count in ((0, columns), (1, rows))
    )
    # The edges of cells and boxes cut the image into pieces, each inside or outside as a whole.
    inside = _inside(boxes, (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2)
    areas = inside * np.diff(y)[:, None] * np.diff(x)
    sums = np.zeros((rows, columns))
    of_row, of_column = (
        np.minimum(((edges[1:] + edges[:-1]) / 2 * count).astype(int), count - 1)
        for edges, count in ((y, rows), (x, columns))
    )
    np.add.at(sums, (of_row[:, None], of_column), areas)
    return sums * rows * columns


def _inside(boxes: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return whether each point of a grid is in a box: bool ``[len(y), len(x)]``."""
    left, top, right, low = (side[:, None] for side in boxes.T)
    # A pixel's corner belongs to one pixel: of adjacent boxes, one has the point between them.
    of_box = ((y >= top) & (y < low))[:, :, None] & ((x >= left) & (x < right))[:, None]
    inside: np.ndarray = of_box.any(axis=0)
    return inside


def map_scores(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Score maps ``[n, rows, columns]`` by the boxes of one pair: float64 ``[n, len(SCORES)]``.

    Pointing game (Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016,
    without their tolerance of 15 pixels): whether the center of the cell with the maximum is in a
    box; of several equal maxima, the share of them that are. IoU: the area that the region and the
    boxes share, divided by that of both together; the region is the cells with at least half the
    maximum. Then whether the IoU is at least 0.1, and 0.3. A map with one value everywhere is as
    good as a point at random, and its region is everything.
    """
    rows, columns = maps.shape[1:]
    highest = maps.max(axis=(1, 2), keepdims=True)
    is_hit = _inside(boxes, (np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows)
    maxima = maps == highest
    pointing = (maxima & is_hit).sum(axis=(1, 2)) / maxima.sum(axis=(1, 2))
    region, target = maps >= _REGION * highest, covered(boxes, rows, columns)
    both = (region * target).sum(axis=(1, 2))
    iou = both / (region.sum(axis=(1, 2)) + target.sum() - both)
    return np.stack([pointing, iou, *(iou >= level for level in _IOU_LEVELS)], axis=1)


def center_map() -> np.ndarray:
    """Return the map of the center baseline: a Gaussian around the middle of the seen part."""
    places = (np.arange(_CENTER_CELLS) + 0.5) / _CENTER_CELLS - 0.5
    squares = (places[:, None] ** 2 + places**2) / CENTER_RADIUS**2
    return np.asarray(np.exp(-math.log(2.0) * squares))


def random_scores(pair: Pair, shape: Tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return the mean scores of 100 maps of uniform noise in the shape of a map, ``[4]``."""
    drawn = np.random.default_rng([seed, pair.row]).random((_RANDOM_MAPS, *shape))
    return np.asarray(map_scores(drawn, pair.boxes).mean(axis=0))


def rank_correlations(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each map with its other, float64 ``[n]``.

    Equal values have their mean rank. NaN where a map has the same value everywhere.
    """
    ranks = [
        pd.DataFrame(each.reshape(len(each), -1)).rank(axis=1).to_numpy() for each in (maps, others)
    ]
    first, second = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return np.asarray(
            (first * second).sum(axis=1) / np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
        )


def means(
    values: Mapping[str, np.ndarray], findings: Sequence[str], patients: np.ndarray
) -> Statistic:
    """Return the means of values of pairs: by finding, over all pairs, and over the findings.

    Parameters
    ----------
    values
        Name -> float64 ``[N]``; NaN leaves the pair out.
    findings, patients
        Of each pair; int64 ``[N]``.

    The names are ``<name>/<finding>``, ``<name>/all`` and ``<name>/macro``.
    """
    groups = sorted(set(findings))
    member = np.array([[*(finding == group for group in groups), True] for finding in findings])
    stacked = np.stack(list(values.values()), axis=1)[:, :, None]
    counted = (member[:, None] & ~np.isnan(stacked)).reshape(len(member), -1)
    summed = (member[:, None] * np.nan_to_num(stacked)).reshape(len(member), -1)
    sums = ratios(summed, counted, patients, [str(column) for column in range(summed.shape[1])])
    shape = (-1, len(values), len(groups) + 1)

    def of(weights: np.ndarray) -> np.ndarray:
        each = sums.of(weights).reshape(shape)
        # Without a finding it would be the mean of others: NaN.
        macro = each[:, :, :-1].mean(axis=2, keepdims=True)
        return np.concatenate([each, macro], axis=2).reshape(len(weights), -1)

    fewest = sums.fewest.reshape(shape[1:])
    names = tuple(f"{name}/{group}" for name in values for group in (*groups, ALL, MACRO))
    return Statistic(names, of, np.concatenate([fewest, fewest[:, -1:]], axis=1).ravel())


def localization(
    scores: Mapping[str, np.ndarray],
    findings: Sequence[str],
    patients: np.ndarray,
    resamples: Resamples,
) -> Dict[str, Any]:
    """Return the mean scores of maps and baselines, and the differences of the maps to the others.

    Parameters
    ----------
    scores
        `MAPS` and names of baselines -> `map_scores` of each pair, float64 ``[N, len(SCORES)]``.
    findings, patients
        Of each pair; int64 ``[N]``.

    Each value is ``{"value", "low", "high"}`` at ``[score][group]``. A difference is over the same
    resamples of the same pairs.
    """
    others = [name for name in scores if name != MAPS]
    versions = {
        **{("scores", name): each for name, each in scores.items()},
        **{("differences", name): scores[MAPS] - scores[name] for name in others},
    }
    values = {
        f"{kind}/{name}/{score}": each[:, column]
        for (kind, name), each in versions.items()
        for column, score in enumerate(SCORES)
    }
    number = len(np.unique(patients))
    found: Dict[str, Any] = {
        "intervals": {
            "level": LEVEL,
            "method": "percentile bootstrap over patients",
            "resamples": resamples.count,
            "seed": resamples.seed,
            "patients": number,
        }
    }
    for key, interval in intervals(means(values, findings, patients), number, resamples).items():
        kind, name, score, group = key.split("/")
        by_name = found.setdefault(kind, {}).setdefault(name, {})
        by_name.setdefault(score, {})[group] = interval._asdict()
    return found


def similarity(
    correlations: Mapping[str, np.ndarray], patients: np.ndarray, resamples: Resamples
) -> List[Dict[str, Any]]:
    """Return the mean of each of some correlations ``[N]``, with its interval, in their order.

    Without a value where none is defined; `undefined` counts the pairs left out.
    """
    number = len(np.unique(patients))
    values = np.stack(list(correlations.values()), axis=1)
    is_defined = ~np.isnan(values)
    mean = ratios(np.nan_to_num(values), is_defined, patients, list(correlations))
    found = intervals(mean, number, resamples)
    return [
        {
            "randomised": name,
            "correlation": found[name]._asdict() if name in found else None,
            "undefined": int((~of_step).sum()),
        }
        for name, of_step in zip(correlations, is_defined.T)
    ]
