"""Intervals by a bootstrap over patients: the images of a patient are not independent."""

from __future__ import annotations

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
#: An interval needs a value in this share of the resamples at least.
_LEAST_DEFINED = 0.95

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

    One patient has no interval: every resample would be the same.
    """
    if patients < 2:
        resamples = Resamples(0, resamples.seed)
    values = statistic.of(np.ones((1, patients), np.int64))[0]
    replicates = replicate(statistic, patients, resamples, progress)
    return {
        name: Interval(float(value), *limits(replicates[:, column]))
        for column, (name, value) in enumerate(zip(statistic.names, values))
        if not np.isnan(value)
    }


def limits(replicates: np.ndarray) -> Tuple[Optional[float], Optional[float]]:
    """Return the percentiles of ``[count]`` replicates that hold `LEVEL` of them, or Nones.

    None where more than a twentieth of the resamples leave the value undefined, as they do for a
    finding that very few patients have.
    """
    defined = replicates[~np.isnan(replicates)]
    if len(defined) < max(2, _LEAST_DEFINED * len(replicates)):
        return None, None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _threads() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1
