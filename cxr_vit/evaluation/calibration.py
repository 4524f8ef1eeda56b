"""How far probabilities are from the rates at which findings are present."""

from __future__ import annotations

import math
from typing import Any, Dict, NamedTuple, Optional

import numpy as np

from cxr_vit.data.records import UNKNOWN
from cxr_vit.evaluation.operating_points import OperatingPoints
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.evaluation.scaling import scaled
from cxr_vit.evaluation.statistics import errors

#: The most bins, and the images that a bin has at least on average.
_BINS, _LEAST_IMAGES = 15, 10


class Reliability(NamedTuple):
    """Mean probability, rate of positives (both float64) and number of images of each bin."""

    mean: np.ndarray
    rate: np.ndarray
    images: np.ndarray


def reliability(probabilities: np.ndarray, truth: np.ndarray) -> Reliability:
    """Sort images into bins of equal mass by their probability, and describe each.

    Parameters
    ----------
    probabilities, truth
        ``[n]``; truth is 0 or 1.

    There are 15 bins, and fewer for less than 150 images: one for each 10 of them, at least one.
    Bin i begins at image ``i n // bins`` of the images in the order of their probability. Images of
    the same probability are in one bin, so that ties make fewer and unequal bins.
    """
    order = np.argsort(probabilities, kind="stable")
    ordered = probabilities[order]
    number = max(1, min(_BINS, len(ordered) // _LEAST_IMAGES))
    at = np.arange(number) * len(ordered) // number
    starts = np.unique(np.searchsorted(ordered, ordered[at])) if len(ordered) else at[:0]
    count = np.diff(np.append(starts, len(ordered)))

    def mean(values: np.ndarray) -> np.ndarray:
        # Not `np.add.reduceat` of float32, whose sums are float32.
        sums = np.add.reduceat(values[order].astype(np.float64), starts) if len(starts) else 0.0
        return np.asarray(sums / np.maximum(count, 1), np.float64)

    return Reliability(mean(probabilities), mean(truth), count)


def expected_calibration_error(probabilities: np.ndarray, truth: np.ndarray) -> Optional[float]:
    """Return the debiased expected calibration error of ``[n]`` probabilities, None if n is 0.

    This is the mean over images of ``|rate - mean|`` of their bin; `reliability` states the bins.
    Noise of the rate makes that too large by about ``E|N(d, s^2)| - |d|``, with ``d = rate - mean``
    and ``s^2 = rate (1 - rate) / images``, which is subtracted: the estimator of Kumar, Liang and
    Ma, Verified Uncertainty Calibration, NeurIPS 2019 (`normal_debiased_ce` of their library), with
    the mean of the folded normal distribution in place of samples. The result is at least 0. It
    removes nearly all of the bias where the probabilities are wrong, and about 40 % of it where
    they are right.
    """
    bins = reliability(probabilities, truth)
    if len(bins.images) == 0:
        return None
    gaps = np.abs(bins.rate - bins.mean)
    deviations = np.sqrt(bins.rate * (1.0 - bins.rate) / bins.images)
    expected = [_folded_normal_mean(gap, each) for gap, each in zip(gaps, deviations)]
    return max(0.0, float(np.average(2.0 * gaps - expected, weights=bins.images)))


def _folded_normal_mean(mean: float, deviation: float) -> float:
    """Return E|X| of a normal X (Leone, Nelson and Nottingham, Technometrics 3, 1961)."""
    if deviation == 0.0:
        return abs(mean)
    ratio = mean / (deviation * math.sqrt(2.0))
    spread = deviation * math.sqrt(2.0 / math.pi) * math.exp(-ratio * ratio)
    return spread + mean * math.erf(ratio)


def calibration(points: OperatingPoints, predictions: Predictions) -> Dict[str, Any]:
    """Describe each label before and after scaling: the section `calibration` of metrics.json.

    A label is None if it was not fitted, or is known for no image; temperature or Platt scaling
    alone is None if only that was not fitted. Bins are mean probability, rate, images.
    """
    found: Dict[str, Any] = {}
    for column, name in enumerate(predictions.names):
        known = predictions.labels[:, column] != UNKNOWN
        label = predictions.probabilities[known, column], predictions.labels[known, column]
        temperature, platt = points.temperature.get(name), points.platt.get(name)
        if not known.any() or (temperature is None and platt is None):
            found[name] = None
            continue
        found[name] = {
            "temperature": temperature,
            "platt": None if platt is None else list(platt),
            "before": _described(*label),
            "temperature_scaled": None
            if temperature is None
            else _described(*label, 1 / temperature),
            "platt_scaled": None if platt is None else _described(*label, *platt),
        }
    return found


def _described(
    probabilities: np.ndarray, truth: np.ndarray, slope: float = 1.0, intercept: float = 0.0
) -> Dict[str, Any]:
    if (slope, intercept) != (1.0, 0.0):
        probabilities = scaled(probabilities, slope, intercept)
    images = np.zeros(len(truth), np.int64)
    statistic = errors(probabilities[:, None], truth[:, None], images, ["label"], [0])
    values = dict(zip(statistic.names, statistic.of(np.ones((1, 1), np.int64))[0].tolist()))
    return {
        "brier": values["brier/label"],
        "log_loss": values["log_loss/label"],
        "expected_calibration_error": expected_calibration_error(probabilities, truth),
        "bins": [
            list(each) for each in zip(*map(np.ndarray.tolist, reliability(probabilities, truth)))
        ],
    }
