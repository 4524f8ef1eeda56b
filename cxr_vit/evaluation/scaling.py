"""Scale the logits of a label so that its probabilities become rates."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

from cxr_vit.evaluation.statistics import clipped

#: Positives, and negatives, that a fit needs.
_LEAST_IMAGES = 10
#: Temperatures and slopes. Scaled probabilities of a smaller slope would round to the same value,
#: and those of a larger one to 0 and 1.
LEAST_SCALE, MOST_SCALE = 1e-6, 1e6
_MOST_STEPS, _TOLERANCE = 100, 1e-9


def scaled(probabilities: np.ndarray, slope: float, intercept: float = 0.0) -> np.ndarray:
    """Return the sigmoid of ``slope * logit + intercept``, float64 ``[n]``."""
    return _sigmoid(slope * _logits(probabilities) + intercept)


def fit_temperature(probabilities: np.ndarray, truth: np.ndarray) -> Optional[float]:
    """Return the temperature that divides the logits of a label, by maximum likelihood.

    Parameters
    ----------
    probabilities, truth
        ``[n]``; truth is 0 or 1.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017. None with less than 10
    positives or 10 negatives; where no temperature above 0 is best, because most logits have the
    wrong sign; and where all have the right sign, because a lower one is always better.
    """
    logits = _logits(probabilities)
    if not has_enough(truth):
        return None
    right = np.where(truth == 1, logits, -logits)
    if not right.min() < 0 < right.max():
        return None
    weights = _maximum_likelihood(logits[:, None], truth)
    if weights is None or not LEAST_SCALE <= weights[0] <= MOST_SCALE:
        return None
    return min(MOST_SCALE, max(LEAST_SCALE, float(1 / weights[0])))


def fit_platt(probabilities: np.ndarray, truth: np.ndarray) -> Optional[Tuple[float, float]]:
    """Return slope and intercept of the logits of a label, by maximum likelihood.

    Parameters
    ----------
    probabilities, truth
        ``[n]``; truth is 0 or 1.

    Platt, Probabilistic Outputs for Support Vector Machines, 1999, with 0 and 1 as targets. None
    with less than 10 positives or 10 negatives; where the slope is not positive, because it would
    reverse the ranking; and where a threshold separates positives from negatives, because a larger
    slope is then always better (Albert and Anderson, Biometrika 71, 1984).
    """
    logits = _logits(probabilities)
    if not has_enough(truth):
        return None
    positive, negative = logits[truth == 1], logits[truth != 1]
    if not (positive.min() < negative.max() and negative.min() < positive.max()):
        return None
    mean, spread = logits.mean(), logits.std()
    standard = (logits - mean) / spread
    weights = _maximum_likelihood(np.stack([standard, np.ones_like(standard)], axis=1), truth)
    if weights is None or not LEAST_SCALE <= weights[0] / spread <= MOST_SCALE:
        return None
    slope = weights[0] / spread
    return float(slope), float(weights[1] - slope * mean)


def has_enough(truth: np.ndarray) -> bool:
    """Whether there are enough positives and negatives for a fit."""
    positives = int((truth == 1).sum())
    return min(positives, len(truth) - positives) >= _LEAST_IMAGES


def _maximum_likelihood(inputs: np.ndarray, truth: np.ndarray) -> Optional[np.ndarray]:
    """Return the weights of a logistic regression on ``[n, k]`` inputs; None if none is found.

    The likelihood is concave, and Newton steps are halved until it does not fall.
    """
    sign = np.where(truth == 1, 1.0, -1.0)

    def loss(weights: np.ndarray) -> float:
        return float(np.logaddexp(0.0, -sign * (inputs @ weights)).sum())

    weights = np.zeros(inputs.shape[1])
    for _ in range(_MOST_STEPS):
        rates = _sigmoid(inputs @ weights)
        information = (inputs * (rates * (1.0 - rates))[:, None]).T @ inputs
        step = np.linalg.lstsq(information, inputs.T @ ((sign > 0) - rates), rcond=None)[0]
        while loss(weights + step) > loss(weights):
            step = step / 2
        weights = weights + step
        if np.abs(step).max() <= _TOLERANCE * (1.0 + np.abs(weights).max()):
            return weights
    return None


def _logits(probabilities: np.ndarray) -> np.ndarray:
    kept = clipped(probabilities)
    return np.log(kept) - np.log1p(-kept)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    # Small values keep their digits, and large logits do not overflow.
    return np.exp(-np.logaddexp(0.0, -logits))
