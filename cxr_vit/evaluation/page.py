"""The report of a scored split as one HTML page."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from cxr_vit.evaluation import statements
from cxr_vit.evaluation.cases import Images, Overlays, cases
from cxr_vit.evaluation.curves import curves, rounded_up, svg_points
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.web_page import render

#: Sections of metrics.json that may be absent.
OPTIONAL_KEYS = ("calibration", "operating_points", "subgroups", "relabels")
#: The keys of metrics.json that are not facts about the origin of the scores.
SCORE_KEYS = {
    *("schema_version", "notice", "split", "num_samples", "num_findings", "intervals", "findings"),
    *("means", *OPTIONAL_KEYS, "positives", "unknown"),
    *("auroc", "auroc_macro", "auroc_defined", "auroc_macro_with_no_finding"),
    *("average_precision", "average_precision_macro"),
}
#: Sides of the squares of the small figures, in units of page.html.
_SIDE = 100.0
#: Labels whose curves and cases are shown, those with the most positives; more make a page that is
#: hard to open.
_MOST_SHOWN = 40

#: The end of a gap's axis that it has always.
_ZERO = {"value": 0.0, "low": None, "high": None}

_SCALINGS = {
    "before": "as predicted",
    "temperature_scaled": "temperature",
    "platt_scaled": "Platt",
}
_ERRORS = {
    "expected_calibration_error": "calibration error",
    "brier": "Brier score",
    "log_loss": "log loss",
}
_POINTS = {
    "youden": "Highest sensitivity + specificity (Youden)",
    "f1": "Highest F1",
    "specificity_95": "Specificity of 95 % at least",
    "sensitivity_95": "Sensitivity of 95 % at least",
}


@dataclass(frozen=True)
class PageContext:
    """What a report says beside its numbers.

    Attributes
    ----------
    title
        One line.
    config_text
        The configuration of the run, as YAML; "" if it is not known.
    versions
        Library -> its version.
    images
        Takes the name of an image, returns the picture or None. Without it no image and no patient
        is named or shown.
    overlays
        What is drawn over the images a second time, if anything.
    """

    title: str
    config_text: str
    versions: Dict[str, str]
    images: Optional[Images] = None
    overlays: Optional[Overlays] = None


def report_page(metrics: Mapping[str, Any], predictions: Predictions, context: PageContext) -> str:
    """Return the page of a report, given the content of its metrics.json.

    Sections that are missing or None in `metrics` are left out.
    """
    metrics = {**dict.fromkeys(OPTIONAL_KEYS), **metrics}
    shown = _shown(metrics)
    found = []
    if context.images is not None:
        found = cases(predictions, context.images, shown, context.overlays)
    return render(
        Path(__file__).with_name("page.html"),
        title=context.title,
        notice=metrics["notice"],
        metrics=metrics,
        context=context,
        answers=statements.answers(metrics),
        figures=_curve_figures(metrics, predictions, shown),
        reliability=_reliability_figures(metrics, shown),
        scalings=_SCALINGS,
        errors=_ERRORS,
        operating_points=_operating_points(metrics),
        subgroups=_subgroups(metrics),
        cases=found,
        has_overlays=any(case.overlay for each in found for case in each.cases),
        facts=origin_facts(metrics),
        say=statements,
        mean_words=statements.MEAN_WORDS,
        axis=_axis(
            [each["auroc"] for of in ("findings", "means") for each in metrics[of].values()]
        ),
        ends=_ends,
    )


def origin_facts(metrics: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """Return what metrics.json says of checkpoint and data, as names and texts."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in metrics.items()
        if key not in SCORE_KEYS
    ]


def _shown(metrics: Mapping[str, Any]) -> List[str]:
    """Return the labels that have figures, in their order."""
    findings = metrics["findings"]
    frequent = sorted(findings, key=lambda name: -findings[name]["positives"])[:_MOST_SHOWN]
    return [name for name in findings if name in frequent]


def _curve_figures(
    metrics: Mapping[str, Any], predictions: Predictions, shown: List[str]
) -> List[Dict[str, Any]]:
    """Return, by label, the points of its ROC and precision-recall curves and its prevalence."""
    figures = []
    for name in shown:
        column = predictions.names.index(name)
        found = curves(predictions.probabilities[:, column], predictions.labels[:, column])
        if found is not None:
            scores = metrics["findings"][name]
            figures.append(
                {
                    "name": name,
                    "roc": svg_points(found.roc, _SIDE),
                    "precision_recall": svg_points(found.precision_recall, _SIDE),
                    "auroc": statements.with_interval(scores["auroc"]),
                    "average_precision": statements.with_interval(scores["average_precision"]),
                    "prevalence": scores["prevalence"],
                    "point": _youden(metrics, name),
                }
            )
    return figures


def _youden(metrics: Mapping[str, Any], name: str) -> Optional[Dict[str, float]]:
    """Return sensitivity and specificity at the Youden threshold of a label, if it has one."""
    points = (metrics["operating_points"] or {"points": {}})["points"]
    point = points.get(name, {}).get("youden")
    if point is None or point["sensitivity"] is None or point["specificity"] is None:
        return None
    return {ratio: point[ratio]["value"] for ratio in ("sensitivity", "specificity")}


def _reliability_figures(metrics: Mapping[str, Any], shown: List[str]) -> List[Dict[str, Any]]:
    """Return, by label, the bins before and after scaling in a square of its own scale."""
    figures = []
    for name in shown:
        calibration = (metrics["calibration"] or {}).get(name)
        if calibration is None:
            continue
        parts = [(key, calibration[key]) for key in _SCALINGS if calibration[key] is not None]
        most = rounded_up(max(max(bin[:2]) for _, part in parts for bin in part["bins"]))
        figures.append(
            {
                "name": name,
                "end": f"{most:g}",
                "scaled": {key: calibration[key] for key in _SCALINGS},
                "temperature": calibration["temperature"],
                "platt": calibration["platt"],
                "parts": [
                    {"kind": key, "points": svg_points(part["bins"], _SIDE, most)}
                    for key, part in parts
                ],
            }
        )
    return figures


def _operating_points(metrics: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Return the rows of each kind of threshold, those with any."""
    points = (metrics["operating_points"] or {"points": {}})["points"]
    tables = [
        {
            "words": words,
            "rows": [(name, kinds[kind]) for name, kinds in points.items() if kind in kinds],
        }
        for kind, words in _POINTS.items()
    ]
    return [table for table in tables if table["rows"]]


def _subgroups(metrics: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Return the groups and gaps of each attribute, with a table for each score that any has."""
    found = []
    for attribute, section in (metrics["subgroups"] or {}).items():
        groups = section["groups"]
        tables = []
        for score, words in statements.GAP_WORDS.items():
            of_score = [
                name
                for name in metrics["findings"]
                if any(group.get(name, {}).get(score) for group in groups.values())
            ]
            if of_score:
                drawn = [section["gaps"].get(name, {}).get(score) for name in of_score]
                axis = _axis([*drawn, _ZERO])
                zero = _ends(_ZERO, axis)["value"]
                part = {"score": score, "words": words, "labels": of_score}
                tables.append({**part, "axis": axis, "zero": zero})
        found.append(
            {
                "name": attribute,
                "groups": groups,
                "gaps": section["gaps"],
                "tables": tables,
                "notes": _notes(metrics, attribute, section),
                "axis": _axis([group["macro"]["auroc"] for group in groups.values()]),
            }
        )
    return found


def _notes(metrics: Mapping[str, Any], attribute: str, section: Mapping[str, Any]) -> List[str]:
    """Say which images and findings the groups of an attribute leave out."""
    notes = []
    if section.get("unknown"):
        notes.append(f"{section['unknown']:,} images of unknown {attribute} are in no group.")
    if section.get("left_out"):
        notes.append(f"{section['left_out']:,} images of smaller groups are left out.")
    if "macro_of" in section:
        total = metrics["num_findings"]
        notes.append(
            f"The macro AUROC is over the {len(section['macro_of'])} of {total} findings that every"
            " group has a score of."
        )
    return notes


def _axis(statistics: List[Optional[Mapping[str, Any]]]) -> Tuple[float, float]:
    """Return the ends of an axis for scores with their intervals, in steps of 0.05."""
    ends = [
        value
        for each in statistics
        if each is not None
        for value in (each["value"], each["low"], each["high"])
        if value is not None
    ]
    if not ends:
        return 0.0, 1.0
    low, high = math.floor(min(ends) * 20) / 20, math.ceil(max(ends) * 20) / 20
    return (low, high) if low < high else (low, low + 0.05)


def _ends(
    statistic: Optional[Mapping[str, Any]], axis: Tuple[float, float]
) -> Dict[str, Optional[str]]:
    """Return value and limits as places on an axis that is 100 units long; {} without a value."""
    low, high = axis
    return {
        key: None if value is None else f"{100 * (value - low) / (high - low):.1f}"
        for key, value in (statistic or {}).items()
        if key in ("value", "low", "high")
    }
