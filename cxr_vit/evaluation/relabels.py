"""Scores by Google's labels of 2019, beside those by NIH's labels of the same images."""

from __future__ import annotations

from typing import Any, Dict, Optional

import numpy as np

from cxr_vit.data.records import NIH_FINDINGS, RELABELS, UNKNOWN
from cxr_vit.evaluation.bootstrap import Resamples, intervals
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.evaluation.statistics import ranking

_TRUTHS = ("google", "nih")


def relabels(predictions: Predictions, resamples: Resamples) -> Optional[Dict[str, Any]]:
    """Score the images that Google's radiologists labelled (Majkowska et al., Radiology 294, 2020).

    Returns, JSON-able, by Google's finding: `nih_findings`, those of NIH that are one of it; the
    `images` that both have labelled, and how many of these are `positives` of Google's and
    `nih_positives`; `auroc` and `average_precision` by either truth, each with its interval, None
    where it is undefined. The score of an image is the highest probability of the NIH findings, and
    NIH's truth is any of them. The images are no random sample, so that their scores are not those
    of the whole split.

    None without such labels, and if the predictions have not all NIH findings of any of them.
    """
    matched = {
        name: [predictions.names.index(label) for label in labels]
        for name, labels in NIH_FINDINGS.items()
        if set(labels) <= set(predictions.names)
    }
    rows = np.flatnonzero(~np.isnan(predictions.relabels).all(axis=1))
    if len(rows) == 0 or not matched:
        return None
    probs, truths = [], []
    for name, columns in matched.items():
        second = predictions.relabels[rows, RELABELS.index(name)]
        first = _any_of(predictions.labels[rows][:, columns])
        both = ~np.isnan(second) & (first != UNKNOWN)
        truths += [np.where(both, second == 1, UNKNOWN), np.where(both, first, UNKNOWN)]
        probs += [predictions.probabilities[rows][:, columns].max(axis=1)] * len(_TRUTHS)
    labels = np.stack(truths, axis=1).astype(np.int8)
    names = [f"{truth}/{name}" for name in matched for truth in _TRUTHS]
    patients = predictions.patients
    statistic = ranking(np.stack(probs, axis=1), labels, patients[rows], names, [])
    found = intervals(statistic, int(patients.max()) + 1, resamples)

    def scores(key: str, name: str) -> Dict[str, Any]:
        values = {truth: found.get(f"{key}/{truth}/{name}") for truth in _TRUTHS}
        return {truth: value and value._asdict() for truth, value in values.items()}

    return {
        name: {
            "nih_findings": list(NIH_FINDINGS[name]),
            "images": int((google != UNKNOWN).sum()),
            "positives": int((google == 1).sum()),
            "nih_positives": int((nih == 1).sum()),
            "auroc": scores("auroc", name),
            "average_precision": scores("average_precision", name),
        }
        for name, google, nih in zip(matched, labels.T[::2], labels.T[1::2])
    }


def _any_of(labels: np.ndarray) -> np.ndarray:
    """Return whether any label ``[n, k]`` is positive, `UNKNOWN` where that depends on others."""
    known = np.where((labels == UNKNOWN).any(axis=1), UNKNOWN, 0)
    return np.where((labels == 1).any(axis=1), 1, known)
