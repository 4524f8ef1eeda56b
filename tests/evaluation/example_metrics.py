"""The content of a metrics.json with every section, computed simply from random predictions."""

from __future__ import annotations

from typing import Any, Dict, Optional, Sequence

import numpy as np
import pandas as pd

from cxr_vit.data.records import RELABELS, UNKNOWN
from cxr_vit.evaluation.bootstrap import Resamples, intervals
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.evaluation.statistics import MEANS, errors, joined, ranking, ratios

SCORES = ("auroc", "average_precision", "brier", "log_loss")
RATIOS = {
    "sensitivity": ("true_positives", "false_negatives"),
    "specificity": ("true_negatives", "false_positives"),
    "ppv": ("true_positives", "false_positives"),
    "npv": ("true_negatives", "false_negatives"),
}


def random_predictions(names: Sequence[str], images: int = 400, seed: int = 0) -> Predictions:
    """Return images of patients with several each; the first labels are frequent, the last rare."""
    random = np.random.default_rng(seed)
    rates = np.geomspace(0.3, 0.03, len(names))
    labels = (random.random((images, len(names))) < rates).astype(np.int8)
    table = pd.DataFrame(
        {
            "image": [f"{row // 2:08d}_{row % 2:03d}.png" for row in range(images)],
            "patient": [f"p{row // 2}" for row in range(images)],
            "split": "test",
            "sex": random.choice(["F", "M"], images),
            "age": random.integers(10, 95, images).astype(np.float64),
            "view": random.choice(["AP", "PA"], images),
        }
    )
    relabels = np.where(random.random((images, 4)) < 0.3, 1.0, 0.0).astype(np.float32)
    return Predictions(tuple(names), table, labels, random_scores(labels, seed), relabels)


def random_scores(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return probabilities that rank the truth better than chance, float32 ``[N, C]``."""
    random = np.random.default_rng([seed, 1])
    rates = (labels == 1).mean(axis=0).clip(1e-3, 0.999)
    logits = np.log(rates / (1 - rates)) + random.normal(size=labels.shape)
    logits += (labels == 1) * np.linspace(2.4, 0.6, labels.shape[1])
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def example_metrics(predictions: Predictions, count: int = 40) -> Dict[str, Any]:
    """Return every section of metrics.json; `count` resamples."""
    names, patients = predictions.names, predictions.patients
    known, positive = predictions.labels != UNKNOWN, predictions.labels == 1
    arguments = predictions.probabilities, predictions.labels, patients, names, predictions.findings
    people, resamples = int(patients.max()) + 1, Resamples(count)
    found = intervals(joined({"": ranking(*arguments), "e": errors(*arguments)}), people, resamples)
    values = {key.partition("/")[2]: each._asdict() for key, each in found.items()}
    thresholds = {
        name: {
            kind: float(np.quantile(predictions.probabilities[:, column], quantile))
            for kind, quantile in (
                ("youden", 0.7),
                ("f1", 0.8),
                ("specificity_95", 0.95),
                ("sensitivity_95", 0.2),
            )
        }
        for column, name in enumerate(names)
        if positive[:, column].any()
    }
    findings = {
        name: {
            "positives": int(positive[:, column].sum()),
            "negatives": int((known & ~positive)[:, column].sum()),
            "unknown": int((~known[:, column]).sum()),
            "prevalence": float(positive[:, column].sum() / max(1, known[:, column].sum())),
            **{score: values.get(f"{score}/{name}") for score in SCORES},
            "expected_calibration_error": 0.01 + 0.01 * column if known[:, column].any() else None,
            "delong": {"low": 0.5, "high": 0.9, "agrees": column != 1}
            if f"auroc/{name}" in values
            else None,
        }
        for column, name in enumerate(names)
    }
    means = {
        mean: {
            **{score: values.get(f"{score}/{mean}") for score in SCORES},
            "expected_calibration_error": 0.05,
        }
        for mean in MEANS
    }
    macro = means["macro"]
    counted = [names[column] for column in predictions.findings]
    return {
        "split": "test",
        "num_samples": len(predictions),
        "auroc_macro": macro["auroc"] and macro["auroc"]["value"],
        "auroc_defined": sum(findings[name]["auroc"] is not None for name in counted),
        "num_findings": len(counted),
        "average_precision_macro": macro["average_precision"]
        and macro["average_precision"]["value"],
        **{
            score: {name: each[score] and each[score]["value"] for name, each in findings.items()}
            for score in SCORES[:2]
        },
        "positives": {name: each["positives"] for name, each in findings.items()},
        "checkpoint": "runs/example/checkpoints/best",
        "step": 1200,
        "csv_sha256": "1" * 64,
        "split_sha256": "2" * 64,
        "changed_since_training": [],
        "notice": "For research only; not a medical device.",
        "schema_version": 1,
        "intervals": {
            "level": 0.95,
            "method": "percentile bootstrap over patients",
            "resamples": count,
            "seed": 0,
            "patients": people,
        },
        "findings": findings,
        "means": means,
        "calibration": _calibration(predictions, thresholds),
        "operating_points": {
            "fitted_on": {"split": "val", "images": 100, "sha256": "3" * 64},
            "points": _points(predictions, thresholds, people, resamples),
        },
        "subgroups": _subgroups(predictions, people, resamples),
        "relabels": _relabels(predictions, people, resamples),
    }


def _calibration(predictions: Predictions, thresholds: Dict[str, Any]) -> Dict[str, Any]:
    def described(probabilities: np.ndarray, truth: np.ndarray) -> Dict[str, Any]:
        parts = np.array_split(np.argsort(probabilities, kind="stable"), 10)
        bins = [
            [float(probabilities[part].mean()), float(truth[part].mean()), len(part)]
            for part in parts
            if len(part)
        ]
        return {"brier": 0.1, "log_loss": 0.3, "expected_calibration_error": 0.02, "bins": bins}

    found: Dict[str, Any] = {}
    for column, name in enumerate(predictions.names):
        known = predictions.labels[:, column] != UNKNOWN
        probs, truth = predictions.probabilities[known, column], predictions.labels[known, column]
        found[name] = name in thresholds and {
            "temperature": 1.2,
            "platt": [0.8, -0.3],
            "before": described(probs**0.8, truth),
            "temperature_scaled": described(probs, truth),
            "platt_scaled": described(probs**1.1, truth),
        }
        found[name] = found[name] or None
    return found


def _points(
    predictions: Predictions, thresholds: Dict[str, Any], people: int, resamples: Resamples
) -> Dict[str, Any]:
    points: Dict[str, Any] = {}
    for column, name in enumerate(predictions.names):
        truth = predictions.labels[:, column]
        for kind, threshold in thresholds.get(name, {}).items():
            above = predictions.probabilities[:, column] >= threshold
            counts = {
                "true_positives": above & (truth == 1),
                "false_positives": above & (truth == 0),
                "true_negatives": ~above & (truth == 0),
                "false_negatives": ~above & (truth == 1),
            }
            tops = np.stack([counts[top] for top, _ in RATIOS.values()], axis=1)
            others = np.stack([counts[other] for _, other in RATIOS.values()], axis=1)
            statistic = ratios(tops, tops | others, predictions.patients, list(RATIOS))
            found = intervals(statistic, people, resamples)
            points.setdefault(name, {})[kind] = {
                "threshold": threshold,
                **{ratio: found[ratio]._asdict() if ratio in found else None for ratio in RATIOS},
                **{count: int(rows.sum()) for count, rows in counts.items()},
            }
    return points


def _subgroups(predictions: Predictions, people: int, resamples: Resamples) -> Dict[str, Any]:
    table, found = predictions.table, {}
    for attribute in ("sex", "age", "view"):
        if attribute not in table:
            continue
        values = table[attribute]
        if attribute == "age":
            values = pd.cut(values, [0, 18, 40, 60, 80, 200], right=False).astype(str)
        groups: Dict[str, Any] = {}
        for group in sorted(set(values)):
            rows = (values == group).to_numpy()
            part = predictions.take(rows)
            statistic = ranking(
                part.probabilities,
                part.labels,
                predictions.patients[rows],
                part.names,
                part.findings,
            )
            scored = intervals(statistic, people, resamples)
            groups[group] = {
                "images": int(rows.sum()),
                "patients": int(part.table["patient"].nunique()),
                "macro": {"auroc": _of(scored, "auroc/macro")},
            }
            for column, name in enumerate(part.names):
                positives = int((part.labels[:, column] == 1).sum())
                rate = {"value": 0.3, "low": 0.2, "high": 0.4}
                groups[group][name] = {
                    "positives": positives,
                    "negatives": int((part.labels[:, column] == 0).sum()),
                    "auroc": _of(scored, f"auroc/{name}") if positives >= 10 else None,
                    "false_negative_rate": rate if positives >= 10 else None,
                }
        gaps = {
            name: {
                "auroc": _gap(groups, name, "auroc"),
                "false_negative_rate": _gap(groups, name, "false_negative_rate"),
            }
            for name in ("macro", *predictions.names)
        }
        found[attribute] = {"groups": groups, "gaps": gaps}
    return found


def _of(found: Dict[str, Any], name: str) -> Optional[Dict[str, Any]]:
    return found[name]._asdict() if name in found else None


def _gap(groups: Dict[str, Any], name: str, score: str) -> Optional[Dict[str, Any]]:
    values = {
        group: each[name][score]["value"] for group, each in groups.items() if each[name].get(score)
    }
    if len(values) < 2:
        return None
    high, low = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
    gap = values[high] - values[low]
    return {"value": gap, "low": gap - 0.05, "high": gap + 0.05, "of": [high, low]}


def _relabels(predictions: Predictions, people: int, resamples: Resamples) -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    score = {"value": 0.8, "low": 0.7, "high": 0.9}
    if np.isnan(predictions.relabels).all():
        return {}
    for column, name in enumerate(RELABELS):
        read = ~np.isnan(predictions.relabels[:, column])
        found[name] = {
            "images": int(read.sum()),
            "positives": int((predictions.relabels[read, column] == 1).sum()),
            "nih_positives": 17,
            "auroc": {"google": score, "nih": score},
            "average_precision": {"google": score, "nih": None},
        }
    return found
