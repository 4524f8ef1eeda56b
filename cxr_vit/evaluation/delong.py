"""DeLong's interval of an AUROC, which the interval of the bootstrap is compared with."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

#: Normal quantile of a two-sided 95 % interval.
_Z = 1.959963984540054
#: The intervals agree if no limit differs by more than this share of the bootstrap's width. The
#: limits of 1,000 resamples vary by 0.02 of it.
AGREEMENT = 0.15


def variance(scores: np.ndarray, truth: np.ndarray) -> Optional[float]:
    """Return DeLong's variance of the AUROC, or None with less than 2 positives or negatives.

    Computed from midranks in O(n log n), after Sun and Xu, "Fast implementation of DeLong's
    algorithm", IEEE Signal Processing Letters 21, 2014; the estimator is that of DeLong et al.,
    Biometrics 44, 1988.

    Parameters
    ----------
    scores
        float ``[n]``, higher for positive.
    truth
        ``[n]``, 0 or 1.
    """
    positive = truth == 1
    above, below = scores[positive], scores[~positive]
    if min(len(above), len(below)) < 2:
        return None
    ranks = _midranks(scores)
    # For each positive, the share of negatives below it; for each negative, of positives above it.
    of_positives = (ranks[positive] - _midranks(above)) / len(below)
    of_negatives = 1.0 - (ranks[~positive] - _midranks(below)) / len(above)
    return float(of_positives.var(ddof=1) / len(above) + of_negatives.var(ddof=1) / len(below))


def delong_interval(
    auroc: float, scores: np.ndarray, truth: np.ndarray
) -> Optional[Tuple[float, float]]:
    """Return the 95 % interval of an AUROC by a normal approximation, cut off at 0 and 1.

    It treats the images as independent. Those of a patient are not, so it is often narrower than
    that of a bootstrap over patients. None where the variance is not defined.
    """
    squared = variance(scores, truth)
    if squared is None:
        return None
    half = _Z * squared**0.5
    return max(0.0, auroc - half), min(1.0, auroc + half)


def agree(first: Tuple[float, float], bootstrap: Tuple[float, float]) -> bool:
    """Whether no limit differs by more than `AGREEMENT` of the width of the bootstrap's."""
    allowed = AGREEMENT * (bootstrap[1] - bootstrap[0])
    return all(abs(own - other) <= allowed for own, other in zip(first, bootstrap))


def _midranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, float64 ``[n]``; equal values have the mean of theirs."""
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[groups]
    return ranks
