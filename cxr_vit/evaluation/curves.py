"""Curves as few points: ROC, precision over recall, and reliability."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from cxr_vit.data.records import UNKNOWN

#: Points of a curve at most, and the distance of the others from it where fewer suffice.
_MOST_POINTS, _DISTANCE = 200, 0.001

Points = List[Tuple[float, float]]


class Curves(NamedTuple):
    """The curves of a label, x and y in 0..1."""

    #: True positive rate over false positive rate.
    roc: Points
    #: Precision over recall, in steps.
    precision_recall: Points


def curves(probabilities: np.ndarray, labels: np.ndarray) -> Optional[Curves]:
    """Return the curves of a label, given ``[N]``; None without a positive or a negative.

    Unknown labels are left out. The area under the first curve is the AUROC, that under the second
    one, which has steps, the average precision; both are then thinned.
    """
    known = labels != UNKNOWN
    scores, truth = probabilities[known], labels[known] == 1
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], len(scores) > 0))
    hits = np.cumsum(truth[order])[ends]
    seen = ends + 1
    if len(hits) == 0 or hits[-1] in (0, seen[-1]):
        return None
    recall = np.append(0.0, hits / hits[-1])
    false_positives = np.append(0.0, (seen - hits) / (seen[-1] - hits[-1]))
    steps = np.repeat(recall, 2)[1:-1], np.repeat(hits / seen, 2)
    return Curves(thinned(false_positives, recall), thinned(*steps))


def thinned(x: np.ndarray, y: np.ndarray) -> Points:
    """Return at most 200 of the points of a curve, float ``[n]``, by Douglas and Peucker's method.

    The points that are left out are at most 0.001 from the lines between the others, or at most
    the smallest distance that leaves 200 of them.
    """
    points = np.stack([x, y], axis=1)
    distance = _DISTANCE
    rows = _corners(points, distance)
    while len(rows) > _MOST_POINTS:
        distance *= 1.5
        rows = _corners(points, distance)
    return [(float(x), float(y)) for x, y in points[rows]]


def _corners(points: np.ndarray, distance: float) -> List[int]:
    """Return the rows whose lines have all points of ``[n, 2]`` within a distance, in order."""
    kept = {0, len(points) - 1}
    parts = [(0, len(points) - 1)]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        line = points[last] - points[first]
        offsets = points[first + 1 : last] - points[first]
        along = np.clip(offsets @ line / max(line @ line, 1e-12), 0.0, 1.0)
        distances = np.hypot(*(offsets - along[:, None] * line).T)
        farthest = int(np.argmax(distances))
        if distances[farthest] > distance:
            middle = first + 1 + farthest
            kept.add(middle)
            parts += [(first, middle), (middle, last)]
    return sorted(kept)


def svg_points(points: Sequence[Sequence[float]], side: float, most: float = 1.0) -> str:
    """Return the points of an SVG polyline in a square of `side`, x and y from 0 to `most`."""
    return " ".join(f"{side * x / most:.1f},{side * (1 - y / most):.1f}" for x, y, *_ in points)


def rounded_up(value: float) -> float:
    """Return the next larger end of an axis from 0 to 1."""
    return next((end for end in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if value <= end), 1.0)
