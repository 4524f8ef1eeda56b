"""Scores as functions of the weights of patients: one pass for many resamples.

A bootstrap over patients draws each of them several times or not at all. A statistic therefore
takes weights, int64 ``[resamples, patients]``, how often each resample has each patient, and
returns float64 ``[resamples, values]``, NaN where a resample leaves a value undefined. With all
weights 1 it is the score itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np

from cxr_vit.config.columns import MEANS
from cxr_vit.data.records import UNKNOWN

Weights = np.ndarray


@dataclass(frozen=True)
class Statistic:
    """Values with names, and the function from weights to them.

    `fewest` is int64 ``[values]``: how many patients each value rests on, those with a positive or
    with a negative image, whichever are fewer.
    """

    names: Tuple[str, ...]
    of: Callable[[Weights], np.ndarray]
    fewest: np.ndarray


def joined(statistics: Dict[str, Statistic]) -> Statistic:
    """Return the values of several statistics, each under ``<key>/<name>``."""
    names = [f"{key}/{name}" for key, each in statistics.items() for name in each.names]

    def of(weights: Weights) -> np.ndarray:
        return np.concatenate([each.of(weights) for each in statistics.values()], axis=1)

    fewest = np.concatenate([each.fewest for each in statistics.values()])
    return Statistic(tuple(names), of, fewest)


class Ranking:
    """Images in the order of their probabilities, for AUROC and average precision.

    Parameters
    ----------
    scores
        float ``[n]``, higher for positive.
    truth
        ``[n]``, 0 or 1.
    patients
        int64 ``[n]``, column of the weights that belongs to each image.
    """

    def __init__(self, scores: np.ndarray, truth: np.ndarray, patients: np.ndarray) -> None:
        order = np.argsort(-scores, kind="stable")
        ordered, positive = scores[order], truth[order] == 1
        self._patients = patients[order]
        self._of_positives = self._patients[positive]
        #: Patients with a positive image or with a negative one, whichever are fewer.
        self.fewest = min(_distinct(self._of_positives), _distinct(self._patients[~positive]))
        # Last image of each group of tied scores. Only groups with a positive count below.
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], len(ordered) > 0))
        groups, sizes = np.unique(
            np.searchsorted(ends, np.flatnonzero(positive)), return_counts=True
        )
        self._last_positives = np.cumsum(sizes) - 1
        #: Images up to the end of each group, and of the one before it.
        self._up_to, self._before = ends[groups] + 1, np.append(0, ends + 1)[groups]

    def of(self, weights: Weights) -> np.ndarray:
        """Return float64 ``[resamples, 3]``: AUROC, average precision, positives.

        AUROC is the probability that a positive has a higher score than a negative, ties count one
        half (Hanley and McNeil, Radiology 143, 1982). Average precision is the sum over thresholds
        of precision times the step of recall, as scikit-learn's. Counts are exact integers, and
        the sums run in the order of the scores: drawing an image twice is the same as having it
        twice, to the last digit.
        """
        if len(self._of_positives) == 0:
            return np.tile([np.nan, np.nan, 0.0], (len(weights), 1))
        count = len(self._patients)
        # Half the memory takes half the time.
        kind = np.int32 if int(weights.max()) * count < 2**31 else np.int64
        weights = weights.astype(kind)
        counted = np.zeros((len(weights), count + 1), kind)
        np.cumsum(np.take(weights, self._patients, axis=1), axis=1, out=counted[:, 1:])
        seen, before = (
            counted[:, places].astype(np.int64) for places in (self._up_to, self._before)
        )
        hits = np.cumsum(weights[:, self._of_positives], axis=1, dtype=np.int64)
        hits = hits[:, self._last_positives]
        new_hits = np.diff(hits, prepend=0)
        positives = hits[:, -1]
        negatives = counted[:, -1] - positives
        # Twice the pairs in the right order: of a group, all negatives after it and half its own.
        misses = (seen - hits) + (before - (hits - new_hits))
        pairs = (new_hits * (2 * negatives[:, None] - misses)).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            auroc = pairs / (2.0 * positives * negatives)
            # A group that no resample has adds 0 hits; its precision does not matter.
            steps = hits / np.maximum(seen, 1) * new_hits
            precision = np.cumsum(steps, axis=1)[:, -1] / positives
        precision[negatives == 0] = np.nan
        return np.stack([auroc, precision, positives.astype(np.float64)], axis=1)


def ranking(
    probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    names: Sequence[str],
    findings: Sequence[int],
    means: Sequence[str] = MEANS,
) -> Statistic:
    """Return AUROC and average precision by label and as means over the findings.

    Parameters
    ----------
    probabilities, labels
        float32 and int8 ``[N, C]``; labels are 0, 1 or `UNKNOWN`, which leaves the image out.
    patients
        int64 ``[N]``.
    findings
        The columns that count in the means: a label such as `No Finding` does not.
    means
        Those of `MEANS` to compute; `micro` takes as long as all labels together.

    The names are ``auroc/<label>`` and ``average_precision/<label>``, then the same of each of the
    means. A mean is over the findings that are defined with all weights 1, and undefined in a
    resample that lacks one of them: it would be the mean of other findings.
    """
    known = labels != UNKNOWN
    by_label = [
        Ranking(probabilities[rows, column], labels[rows, column], patients[rows])
        for column, rows in enumerate(known.T)
    ]
    columns = [column for column in findings if by_label[column].fewest > 0]
    micro = _pooled(probabilities, labels, patients, list(findings)) if "micro" in means else None

    def of(weights: Weights) -> np.ndarray:
        each = np.stack([label.of(weights) for label in by_label], axis=2)
        pooled = np.empty((len(weights), 3)) if micro is None else micro.of(weights)
        parts: List[np.ndarray] = []
        for row in (0, 1):
            values, counted = each[:, row], each[:, row][:, columns]
            of_mean = {
                "macro": _weighted_mean(counted, np.ones_like(counted)),
                "weighted": _weighted_mean(counted, each[:, 2][:, columns]),
                "micro": pooled[:, row],
            }
            parts += [values, *(of_mean[name][:, None] for name in means)]
        return np.concatenate(parts, axis=1)

    values = [*names, *means]
    fewest = [*(label.fewest for label in by_label), *[_distinct(patients)] * len(means)]
    return Statistic(
        tuple(f"{score}/{name}" for score in ("auroc", "average_precision") for name in values),
        of,
        np.tile(np.array(fewest, np.int64), 2),
    )


def _pooled(
    probabilities: np.ndarray, labels: np.ndarray, patients: np.ndarray, columns: List[int]
) -> Ranking:
    """Return the ranking of all known labels of these columns together."""
    rows, places = np.nonzero(labels[:, columns] != UNKNOWN)
    chosen = np.asarray(columns, np.int64)[places]
    return Ranking(probabilities[rows, chosen], labels[rows, chosen], patients[rows])


def ratios(
    numerators: np.ndarray, denominators: np.ndarray, patients: np.ndarray, names: Sequence[str]
) -> Statistic:
    """Return sums over images divided by sums over images: sensitivities, mean errors, ...

    A value rests on the patients with a denominator.

    Parameters
    ----------
    numerators, denominators
        ``[N, K]``, one column a value.
    patients
        int64 ``[N]``.
    """
    count = _count(patients)
    above, below = (
        _by_patient(numerators, patients, count),
        _by_patient(denominators, patients, count),
    )

    def of(weights: Weights) -> np.ndarray:
        drawn = weights[:, :count].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (drawn @ above) / (drawn @ below)

    return Statistic(tuple(names), of, (below > 0).sum(axis=0))


def _by_patient(values: np.ndarray, patients: np.ndarray, count: int) -> np.ndarray:
    """Sum the rows of each patient: float64 ``[count, K]``."""
    sums = np.zeros((count, values.shape[1]), np.float64)
    np.add.at(sums, patients, values.astype(np.float64))
    return sums


def errors(
    probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    names: Sequence[str],
    findings: Sequence[int],
) -> Statistic:
    """Return Brier score and log loss by label and as means over the findings.

    The arguments are those of `ranking`. The Brier score is the mean of (p - y)^2, the log loss the
    mean of -log p of the truth, in nats, with p kept off 0 and 1 by the step of float32 next to 1.
    A label is defined if any image is known. `weighted` weights by the positives. The means are
    over the same findings in every resample, as those of `ranking`.
    """
    known, truth = labels != UNKNOWN, labels == 1
    kept = clipped(probabilities)
    squares = np.where(known, (probabilities.astype(np.float64) - truth) ** 2, 0.0)
    logs = np.where(known, -np.log(np.where(truth, kept, 1.0 - kept)), 0.0)
    columns = [column for column in findings if known[:, column].any()]
    of_findings = known[:, columns]
    pooled = [
        np.concatenate([values, values[:, columns].sum(axis=1, keepdims=True)], axis=1)
        for values in (squares, logs)
    ]
    counted = np.concatenate([known, of_findings.sum(axis=1, keepdims=True)], axis=1)
    sums = ratios(
        np.concatenate(pooled, axis=1),
        np.concatenate([counted, counted], axis=1),
        patients,
        [f"{score}/{name}" for score in ("brier", "log_loss") for name in (*names, "micro")],
    )
    positives = _by_patient(truth[:, columns] & of_findings, patients, _count(patients))

    def of(weights: Weights) -> np.ndarray:
        values = sums.of(weights)
        shares = weights[:, : len(positives)].astype(np.float64) @ positives
        parts: List[np.ndarray] = []
        for half in np.split(values, 2, axis=1):
            each, micro = half[:, :-1], half[:, -1:]
            chosen = each[:, columns]
            macro = _weighted_mean(chosen, np.ones_like(chosen))
            parts += [each, np.stack([macro, _weighted_mean(chosen, shares)], axis=1), micro]
        return np.concatenate(parts, axis=1)

    labelled = [*names, *MEANS]
    sides = (known & truth, known & ~truth)
    fewest = [
        min(_distinct(patients[side[:, column]]) for side in sides) for column in range(len(names))
    ]
    fewest += [_distinct(patients)] * len(MEANS)
    return Statistic(
        tuple(f"{score}/{name}" for score in ("brier", "log_loss") for name in labelled),
        of,
        np.tile(np.array(fewest, np.int64), 2),
    )


def clipped(probabilities: np.ndarray) -> np.ndarray:
    """Return probabilities as float64, kept off 0 and 1 so that their logarithms are finite."""
    step = float(np.finfo(np.float32).epsneg)
    return np.clip(probabilities.astype(np.float64), step, 1.0 - step)


def _count(patients: np.ndarray) -> int:
    return int(patients.max()) + 1 if len(patients) else 0


def _distinct(patients: np.ndarray) -> int:
    return len(np.unique(patients))


def _weighted_mean(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the mean of each row, NaN where a value is, or where there are no shares."""
    with np.errstate(invalid="ignore"):
        return _sum(values * shares) / _sum(shares)


def _sum(values: np.ndarray) -> np.ndarray:
    """Sum each row in an order that does not depend on the number of rows or their layout."""
    total: np.ndarray = np.ascontiguousarray(values).sum(axis=1)
    return total
