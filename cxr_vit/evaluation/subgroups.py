"""Scores by group: sex, age, view, visit and source, and the gaps between the groups."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.data.records import UNKNOWN
from cxr_vit.evaluation.bootstrap import Interval, Resamples, intervals
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.evaluation.statistics import Ranking, Statistic, Weights, ratios

#: Attribute -> its column in `Predictions.table`.
ATTRIBUTES = {
    "sex": "sex",
    "age": "age",
    "view": "view",
    "visit": "follow_up",
    "source": "source",
}
#: Positives, and for AUROC negatives, that a score of a group needs.
FEWEST = 10
#: Groups that are scored, those with the most images: a text may be that of one image.
MOST_GROUPS = 50

#: First year of each group of ages.
_AGES = {"0-17": 0, "18-39": 18, "40-59": 40, "60-79": 60, "80+": 80}
_VISITS = ("first", "follow_up")
_SCORES = ("auroc", "false_negative_rate")


class _Pair(NamedTuple):
    """The groups with the highest and the lowest value of a score of a label, by their numbers."""

    score: int
    label: int
    highest: int
    lowest: int


def subgroups(
    predictions: Predictions, thresholds: Mapping[str, float], resamples: Resamples
) -> Dict[str, Any]:
    """Score the groups of each attribute that is known for any image.

    Parameters
    ----------
    thresholds
        By label: an image is called positive from this probability on. The false negative rate, the
        share of the positives that are not, is None for other labels.

    Returns, JSON-able, by attribute

    - `groups`: by group `images`, `patients`, and by label `positives`, `negatives`, `auroc` and
      `false_negative_rate`. A score is None with fewer than `FEWEST` positives, an AUROC also with
      fewer negatives. Of `macro`, `auroc` is the mean over the findings of `macro_of`.
    - `macro_of`: the findings with an AUROC in every group that has a mean, so that the means are
      over the same findings. A group with an AUROC for less than half as many findings as the group
      with the most has no mean; else it would leave nearly nothing to compare the others on.
    - `gaps`: by label, and of `macro`, the highest value of a score minus the lowest, and the two
      groups, as `of`; None where fewer than two groups have the score.
    - `unknown`: images of no known group; `left_out`: those of groups beyond `MOST_GROUPS`.

    The groups of a gap are those of the point estimate. Its interval is of the difference between
    these two, scored with the same resamples: groups that share patients are compared as pairs. The
    two were chosen among all groups for their difference, which makes a gap larger than it would be
    on new patients, the more the smaller the groups are; an interval without 0 is no test that the
    groups differ.
    """
    found = {}
    for attribute, column in ATTRIBUTES.items():
        if column not in predictions.table:
            continue
        names, groups = _groups(predictions.table[column])
        if (groups >= 0).any():
            found[attribute] = _scored(predictions, names, groups, thresholds, resamples)
    return found


def _groups(values: pd.Series) -> Tuple[List[str], np.ndarray]:
    """Return the names of groups, and each row's group, int64 ``[N]``, -1 where unknown."""
    if values.name == "age":
        years = values.to_numpy(dtype=np.float64)
        years = np.where(np.isfinite(years), years, -1.0)
        return list(_AGES), np.digitize(years, list(_AGES.values())) - 1
    if values.name == "follow_up":
        number = values.to_numpy(dtype=np.float64)
        return list(_VISITS), np.where(number >= 0, number > 0, -1).astype(np.int64)
    codes, names = pd.factorize(values.where(values != "", None), sort=True)
    return list(names), codes


def _scored(
    predictions: Predictions,
    names: Sequence[str],
    groups: np.ndarray,
    thresholds: Mapping[str, float],
    resamples: Resamples,
) -> Dict[str, Any]:
    """Return what `subgroups` says of an attribute, given the group of each row."""
    images = np.bincount(groups[groups >= 0], minlength=len(names))
    kept = np.sort(np.argsort(-images, kind="stable")[: min(MOST_GROUPS, (images > 0).sum())])
    each = _Groups(predictions, [np.flatnonzero(groups == group) for group in kept], thresholds)
    labels = [*predictions.names, "macro"]
    chosen = [names[group] for group in kept]
    values = each.intervals(resamples)

    def described(key: str) -> Optional[Dict[str, Any]]:
        return values[key]._asdict() if key in values else None

    by_group: Dict[str, Any] = {}
    for group, name in enumerate(chosen):
        by_group[name] = {
            "images": len(each.rows[group]),
            "patients": len(np.unique(each.patients[each.rows[group]])),
        }
        for label, text in enumerate(predictions.names):
            by_group[name][text] = {
                "positives": int(each.positives[group, label]),
                "negatives": int(each.negatives[group, label]),
                **{_SCORES[of]: described(f"{of}/{group}/{label}") for of in (0, 1)},
            }
        by_group[name]["macro"] = {"auroc": described(f"0/{group}/{len(labels) - 1}")}
    gaps: Dict[str, Any] = {}
    for of, label, highest, lowest in each.pairs:
        gap = gaps.setdefault(labels[label], dict.fromkeys(_SCORES))
        pair = [chosen[highest], chosen[lowest]]
        gap[_SCORES[of]] = {**values[f"gap/{of}/{label}"]._asdict(), "of": pair}
    return {
        "groups": by_group,
        "gaps": gaps,
        "macro_of": [predictions.names[label] for label in each.common],
        "unknown": int((groups < 0).sum()),
        "left_out": int(images.sum() - images[kept].sum()),
    }


class _Groups:
    """Groups of images, and their scores as functions of the weights of patients.

    Attributes
    ----------
    rows
        The images of each group.
    patients
        int64 ``[N]``, of all images: a resample draws the same patients for every group.
    positives, negatives
        int64 ``[groups, labels]``.
    common
        The findings of the means.
    pairs
        The groups of each gap.
    """

    def __init__(
        self, predictions: Predictions, rows: List[np.ndarray], thresholds: Mapping[str, float]
    ) -> None:
        labels, self.rows, self.patients = predictions.labels, rows, predictions.patients
        self.positives = np.stack([(labels[chosen] == 1).sum(axis=0) for chosen in rows])
        self.negatives = np.stack([(labels[chosen] == 0).sum(axis=0) for chosen in rows])
        enough = self.positives >= FEWEST
        is_ranked = enough & (self.negatives >= FEWEST)
        self._rankings = {
            (group, label): self._ranking(predictions, group, label)
            for group, label in np.argwhere(is_ranked).tolist()
        }
        self._misses = [
            self._false_negatives(predictions, group, enough[group], thresholds)
            for group in range(len(rows))
        ]
        findings = np.array(predictions.findings, np.int64)
        ranked = is_ranked[:, findings].sum(axis=1)
        self._compared = np.flatnonzero((ranked > 0) & (2 * ranked >= ranked.max()))
        self.common = findings[is_ranked[self._compared][:, findings].all(axis=0)].tolist()
        if len(self._compared) == 0:
            self.common = []
        self.pairs = _pairs(self._scores(np.ones((1, self.patients.max() + 1), np.int64))[0])

    def _ranking(self, predictions: Predictions, group: int, label: int) -> Ranking:
        rows = self.rows[group]
        rows = rows[predictions.labels[rows, label] != UNKNOWN]
        truth = predictions.labels[rows, label]
        return Ranking(predictions.probabilities[rows, label], truth, self.patients[rows])

    def _false_negatives(
        self,
        predictions: Predictions,
        group: int,
        is_counted: np.ndarray,
        given: Mapping[str, float],
    ) -> Statistic:
        """Return the rate by label, undefined where it is not counted or has no threshold."""
        rows = self.rows[group]
        thresholds = np.array([given.get(name, np.nan) for name in predictions.names])
        is_positive = (predictions.labels[rows] == 1) & is_counted & ~np.isnan(thresholds)
        is_missed = is_positive & (predictions.probabilities[rows].astype(np.float64) < thresholds)
        return ratios(is_missed, is_positive, self.patients[rows], predictions.names)

    def _scores(self, weights: Weights) -> np.ndarray:
        """Return float64 ``[resamples, scores, groups, labels and their mean]``."""
        shape = (len(weights), len(_SCORES), len(self.rows), self.positives.shape[1] + 1)
        values = np.full(shape, np.nan)
        for (group, label), ranking in self._rankings.items():
            values[:, 0, group, label] = ranking.of(weights)[:, 0]
        for group, misses in enumerate(self._misses):
            values[:, 1, group, :-1] = misses.of(weights)
        if self.common:
            common = values[:, 0, self._compared][:, :, self.common]
            values[:, 0, self._compared, -1] = common.sum(axis=2) / len(self.common)
        return values

    def _fewest(self) -> np.ndarray:
        """Return the patients that each value rests on: int64, in the shape of a resample's."""
        fewest = np.zeros((len(_SCORES), len(self.rows), self.positives.shape[1] + 1), np.int64)
        for (group, label), ranking in self._rankings.items():
            fewest[0, group, label] = ranking.fewest
        for group, (rows, misses) in enumerate(zip(self.rows, self._misses)):
            fewest[1, group, :-1] = misses.fewest
            fewest[0, group, -1] = len(np.unique(self.patients[rows]))
        return fewest

    def intervals(self, resamples: Resamples) -> Dict[str, Interval]:
        """Return what is defined: ``<score>/<group>/<label>``, ``gap/<score>/<label>``, by number.

        The number after those of the labels is that of the mean.
        """
        fewest = self._fewest()
        names = ["/".join(map(str, place)) for place in np.ndindex(*fewest.shape)]
        names += [f"gap/{pair.score}/{pair.label}" for pair in self.pairs]
        of, label, highest, lowest = (
            np.array(self.pairs, np.int64).reshape(-1, len(_Pair._fields)).T
        )

        def statistic(weights: Weights) -> np.ndarray:
            values = self._scores(weights)
            gaps = values[:, of, highest, label] - values[:, of, lowest, label]
            return np.concatenate([values.reshape(len(weights), -1), gaps], axis=1)

        of_gaps = np.minimum(fewest[of, highest, label], fewest[of, lowest, label])
        every = np.concatenate([fewest.ravel(), of_gaps])
        count = int(self.patients.max()) + 1
        return intervals(Statistic(tuple(names), statistic, every), count, resamples)


def _pairs(values: np.ndarray) -> List[_Pair]:
    """Return the groups of each gap, given float64 ``[scores, groups, labels]``."""
    pairs = []
    for score, label in np.ndindex(values.shape[0], values.shape[2]):
        column = values[score, :, label]
        defined = np.flatnonzero(~np.isnan(column))
        if len(defined) > 1:
            # The first and the last, so that groups with the same value are two.
            ordered = defined[np.argsort(-column[defined], kind="stable")]
            pairs.append(_Pair(score, label, int(ordered[0]), int(ordered[-1])))
    return pairs
