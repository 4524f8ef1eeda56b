"""The scores of a split with their intervals, by finding and as means over the findings."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import numpy as np

from cxr_vit.config.columns import MEANS
from cxr_vit.data.records import UNKNOWN
from cxr_vit.evaluation.bootstrap import LEVEL, Interval, Progress, Resamples, intervals
from cxr_vit.evaluation.calibration import expected_calibration_error
from cxr_vit.evaluation.delong import agree, delong_interval
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.evaluation.statistics import errors, joined, ranking

_METHOD = "percentile bootstrap over patients"
_RANKING = ("auroc", "average_precision")
_ERRORS = ("brier", "log_loss")


def score(
    predictions: Predictions, resamples: Resamples, progress: Optional[Progress] = None
) -> Dict[str, Any]:
    """Return `intervals`, `findings` and `means` of metrics.json.

    Every score is that of the images whose label is known. AUROC and average precision are None
    without a positive or a negative one, Brier score, log loss and expected calibration error
    without any. Limits are None as `intervals` says. `progress` is called with resamples that were
    finished.
    """
    names, findings = predictions.names, predictions.findings
    patients = predictions.patients
    count = int(patients.max()) + 1 if len(patients) else 0
    given = predictions.probabilities, predictions.labels, patients, names, findings
    found = intervals(
        joined({"ranking": ranking(*given), "errors": errors(*given)}), count, resamples, progress
    )
    return {
        "intervals": {
            "level": LEVEL,
            "method": _METHOD,
            "resamples": resamples.count,
            "seed": resamples.seed,
            "patients": count,
        },
        "findings": {
            name: _of_finding(predictions, column, found) for column, name in enumerate(names)
        },
        "means": _means(predictions, found),
    }


def _of_finding(
    predictions: Predictions, column: int, found: Dict[str, Interval]
) -> Dict[str, Any]:
    known = predictions.labels[:, column] != UNKNOWN
    truth = predictions.labels[known, column] == 1
    probs = predictions.probabilities[known, column]
    positives, negatives = int(truth.sum()), int((~truth).sum())
    scores = _scores(found, predictions.names[column])
    return {
        "positives": positives,
        "negatives": negatives,
        "unknown": len(known) - len(truth),
        "prevalence": positives / len(truth) if len(truth) else None,
        **scores,
        "expected_calibration_error": expected_calibration_error(probs, truth),
        "delong": _delong(scores["auroc"], probs, truth),
    }


def _scores(found: Dict[str, Interval], name: str) -> Dict[str, Any]:
    """Return the scores of a finding or a mean; None where they are undefined."""
    scores: Dict[str, Any] = {}
    for family, keys in (("ranking", _RANKING), ("errors", _ERRORS)):
        for key in keys:
            interval = found.get(f"{family}/{key}/{name}")
            scores[key] = None if interval is None else interval._asdict()
    return scores


def _delong(
    auroc: Optional[Dict[str, Any]], probs: np.ndarray, truth: np.ndarray
) -> Optional[Dict[str, Any]]:
    """Return DeLong's interval and whether it agrees, None without one to compare it with."""
    if auroc is None or auroc["low"] is None:
        return None
    limits = delong_interval(auroc["value"], probs, truth)
    if limits is None:
        return None
    low, high = limits
    return {"low": low, "high": high, "agrees": agree(limits, (auroc["low"], auroc["high"]))}


def _means(predictions: Predictions, found: Dict[str, Interval]) -> Dict[str, Any]:
    """Return the scores of each of `MEANS`."""
    columns = predictions.findings
    labels, probs = predictions.labels[:, columns], predictions.probabilities[:, columns]
    known = labels != UNKNOWN
    each = [
        expected_calibration_error(prob[rows], label[rows] == 1)
        for prob, label, rows in zip(probs.T, labels.T, known.T)
    ]
    calibration = {
        "macro": _weighted(each, [1] * len(each)),
        "weighted": _weighted(each, (labels == 1).sum(axis=0).tolist()),
        "micro": expected_calibration_error(probs[known], labels[known] == 1),
    }
    return {
        name: {**_scores(found, name), "expected_calibration_error": calibration[name]}
        for name in MEANS
    }


def _weighted(values: List[Optional[float]], weights: List[int]) -> Optional[float]:
    """Return the weighted mean of the defined values, None without any."""
    defined = [(value, weight) for value, weight in zip(values, weights) if value is not None]
    total = sum(weight for _, weight in defined)
    return sum(value * weight for value, weight in defined) / total if total else None
