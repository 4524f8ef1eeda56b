"""Intervals by a bootstrap over patients: the images of a patient are not independent."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable, Dict, NamedTuple, Optional, Tuple

import numpy as np

from cxr_vit.evaluation.statistics import Statistic

#: Coverage that the intervals aim at.
LEVEL = 0.95
#: Resamples that are scored together: more use more memory and are not faster.
_TOGETHER = 8
#: Patients that an interval needs: with a positive image and with a negative one, with a
#: denominator, or of a mean in all. Intervals of fewer are too narrow.
LEAST_PATIENTS = 10
#: An interval needs a value in this share of the resamples at least.
_LEAST_DEFINED = 0.5

#: Takes the number of resamples just finished, as `cxr_vit.console.progress` does.
Progress = Callable[[int], None]


class Interval(NamedTuple):
    """A score with the limits of its interval, None where there is none."""

    value: float
    low: Optional[float]
    high: Optional[float]


@dataclass(frozen=True)
class Resamples:
    """How patients are drawn: `count` times, each time as many as there are, with replacement.

    Resample i draws with the generator of ``[seed, i]``, so that it does not depend on the number
    of threads, or on how many others are drawn.
    """

    count: int = 1000
    seed: int = 0

    def weights(self, index: int, patients: int) -> np.ndarray:
        """Return int64 ``[patients]``: how often resample `index` has each patient."""
        generator = np.random.default_rng([self.seed, index])
        drawn = generator.integers(0, patients, patients)
        return np.bincount(drawn, minlength=patients).astype(np.int64)


def replicate(
    statistic: Statistic, patients: int, resamples: Resamples, progress: Optional[Progress] = None
) -> np.ndarray:
    """Return the statistic of every resample: float64 ``[count, values]``.

    It runs in as many threads as this process may use processors; `progress` is called in one.
    """
    firsts = range(0, resamples.count, _TOGETHER)

    def score(first: int) -> np.ndarray:
        indices = range(first, min(first + _TOGETHER, resamples.count))
        return statistic.of(np.stack([resamples.weights(index, patients) for index in indices]))

    parts = []
    with ThreadPoolExecutor(_threads()) as pool:
        for part in pool.map(score, firsts):
            parts.append(part)
            if progress is not None:
                progress(len(part))
    return np.concatenate(parts) if parts else np.empty((0, len(statistic.names)))


def intervals(
    statistic: Statistic, patients: int, resamples: Resamples, progress: Optional[Progress] = None
) -> Dict[str, Interval]:
    """Return each value that is defined, by name, with its interval over `patients` patients.

    A value that rests on less than `LEAST_PATIENTS` has no limits.
    """
    has_limits = statistic.fewest >= LEAST_PATIENTS
    if not has_limits.any():
        resamples = Resamples(0, resamples.seed)
    values = statistic.of(np.ones((1, patients), np.int64))[0]
    replicates = replicate(statistic, patients, resamples, progress)
    return {
        name: Interval(float(value), *(limits(of_value) if has else (None, None)))
        for name, value, of_value, has in zip(statistic.names, values, replicates.T, has_limits)
        if not np.isnan(value)
    }


def defined(replicates: np.ndarray) -> np.ndarray:
    """Return the values of those resamples that have one; none if less than half of them do."""
    kept = replicates[~np.isnan(replicates)]
    return kept if len(kept) >= max(2, _LEAST_DEFINED * len(replicates)) else kept[:0]


def limits(replicates: np.ndarray) -> Tuple[Optional[float], Optional[float]]:
    """Return the percentiles of ``[count]`` replicates that hold `LEVEL` of them, or Nones.

    None where more than half of the resamples leave the value undefined, and where the limits are
    the same, as those of a perfect score: that says nothing of the next patient.
    """
    kept = defined(replicates)
    if len(kept) == 0:
        return None, None
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Equal up to the rounding of sums.
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12):
        return None, None
    return float(low), float(high)


def _threads() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1
