"""The report of a split: its files, and a table on the terminal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cxr_vit.config.columns import is_no_finding
from cxr_vit.console import progress
from cxr_vit.errors import DataError
from cxr_vit.evaluation.bootstrap import LEAST_PATIENTS, Resamples
from cxr_vit.evaluation.calibration import calibration
from cxr_vit.evaluation.figures import roc_figure
from cxr_vit.evaluation.metrics import mean_of_defined
from cxr_vit.evaluation.model_card import model_card
from cxr_vit.evaluation.operating_points import OPERATING_POINTS, OperatingPoints, apply
from cxr_vit.evaluation.page import PageContext, report_page
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.evaluation.relabels import relabels
from cxr_vit.evaluation.scores import score
from cxr_vit.evaluation.statistics import clipped
from cxr_vit.evaluation.subgroups import subgroups
from cxr_vit.files import remove, replacing, write_text, writing_to

NOTICE = "For research only; not a medical device."
#: Version of the keys of metrics.json.
SCHEMA_VERSION = 1
#: Files of a report.
PREDICTIONS, METRICS = "predictions.csv", "metrics.json"
PAGE, MODEL_CARD = "report.html", "MODEL_CARD.md"


def write_report(
    folder: Path,
    predictions: Predictions,
    context: PageContext,
    *,
    resamples: Resamples,
    origin: Dict[str, Any],
    points: Optional[OperatingPoints] = None,
    source: Optional[Path] = None,
) -> Dict[str, Any]:
    """Write the files of the report of a scored split; return the content of metrics.json.

    `points` are written beside the scores; a file of an earlier report is removed without them.
    `origin` are JSON-able facts to store with the scores: checkpoint, step, data hashes. `source`
    is the file that the predictions are from, if any; that file itself is not written. Raises
    DataError if the folder cannot be written, or as `refuse_other_files` does.
    """
    refuse_other_files(folder, source)
    computed = compute_metrics(predictions, resamples, points)
    facts = {key: value for key, value in origin.items() if key not in computed}
    metrics = {**computed, **facts, "notice": NOTICE}
    page, card = report_page(metrics, predictions, context), model_card(metrics, context)
    title = (
        f"ROC on {metrics['split']}, {len(predictions)} images, macro AUROC {_mean_text(metrics)}"
    )
    probs = clipped(predictions.probabilities)
    logits = torch.from_numpy((np.log(probs) - np.log1p(-probs)).astype(np.float32))
    labels = torch.from_numpy(predictions.labels.astype(np.float32))
    figure = roc_figure(logits, labels, predictions.names, title=title)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "svg"):
            with replacing(folder / f"roc.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=100)
        write_text(folder / MODEL_CARD, card)
        # Before the predictions: they tell `refuse_other_files` that those are of a report.
        write_text(folder / PAGE, page)
        remove(folder / METRICS)  # of an earlier report: not beside other predictions
        path, stored = folder / PREDICTIONS, folder / OPERATING_POINTS
        is_source = _is_same(path, source)
        if not is_source:
            predictions.write(path)
        if points is not None:
            points.write(stored)
        elif not is_source:
            remove(stored)
        metrics["predictions_sha256"] = sha256_of(path)
        metrics["operating_points_sha256"] = None if points is None else sha256_of(stored)
        # Written last: where it exists, the report is complete.
        write_text(folder / METRICS, json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    return metrics


def refuse_other_files(folder: Path, source: Optional[Path] = None) -> None:
    """Raise DataError if a folder has a predictions.csv of the user's, other than `source`.

    A file with a page or scores beside it is of a report, perhaps one that was cut off.
    """
    path = folder / PREDICTIONS
    is_report = any((folder / name).exists() for name in (PAGE, METRICS))
    if path.exists() and not is_report and not _is_same(path, source):
        raise DataError(
            f"{path} is not of a report of evaluate.py and would be replaced. Give another folder"
            " with --out."
        )


def _is_same(path: Path, source: Optional[Path]) -> bool:
    return source is not None and path.exists() and path.samefile(source)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compute_metrics(
    predictions: Predictions, resamples: Resamples, points: Optional[OperatingPoints]
) -> Dict[str, Any]:
    """Return what metrics.json has of predictions: the scores in brief, then the sections."""
    sections = _sections(predictions, resamples, points)
    return {
        "schema_version": SCHEMA_VERSION,
        "split": predictions.split,
        **_brief(predictions, sections["findings"], sections["means"]["macro"]),
        **sections,
    }


def _sections(
    predictions: Predictions, resamples: Resamples, points: Optional[OperatingPoints]
) -> Dict[str, Any]:
    """Return the sections of metrics.json, each the result of a function of the predictions."""
    with progress("resample", done=0, total=resamples.count) as advance:
        scores = score(predictions, resamples, advance)
    youden = {} if points is None else points.of_kind("youden")
    return {
        **scores,
        "operating_points": points and apply(points, predictions, resamples),
        "calibration": points and calibration(points, predictions),
        "subgroups": subgroups(predictions, youden, resamples),
        "relabels": relabels(predictions, resamples),
    }


def _brief(
    predictions: Predictions, findings: Dict[str, Any], macro: Dict[str, Any]
) -> Dict[str, Any]:
    """Return the scores without intervals, by kind: the keys of earlier versions."""
    by_kind: Dict[str, Dict[str, Optional[float]]] = {
        kind: {name: each[kind] and each[kind]["value"] for name, each in findings.items()}
        for kind in ("auroc", "average_precision")
    }
    auroc = by_kind["auroc"]
    counted = [name for name in findings if not is_no_finding(name)]
    brief: Dict[str, Any] = {
        "num_samples": len(predictions),
        "auroc_macro": macro["auroc"] and macro["auroc"]["value"],
        "auroc_defined": sum(auroc[name] is not None for name in counted),
        "num_findings": len(counted),
        "average_precision_macro": macro["auroc"] and macro["average_precision"]["value"],
        **by_kind,
        "positives": {name: each["positives"] for name, each in findings.items()},
    }
    if len(counted) < len(findings):
        brief["auroc_macro_with_no_finding"] = mean_of_defined(list(auroc.values()))
    if any(each["unknown"] for each in findings.values()):
        brief["unknown"] = {name: each["unknown"] for name, each in findings.items()}
    return brief


def print_table(metrics: Dict[str, Any], console: Optional[Console] = None) -> None:
    """Print one row per label, and the means; a column of unknown labels if there are any."""
    console = console or Console()
    has_unknown = "unknown" in metrics
    table = Table(
        title=f"{metrics['split']}: {metrics['num_samples']} images",
        # Else there is no room for one more column in 80.
        show_edge=not has_unknown,
        collapse_padding=has_unknown,
        pad_edge=not has_unknown,
    )
    table.add_column("finding", no_wrap=True)
    level = f"{100 * metrics['intervals']['level']:.0f} %"
    headings = ["positive", f"AUROC\n({level} interval)", "avg.\nprec.", "prevalence"]
    for heading in [*headings, "unknown"] if has_unknown else headings:
        table.add_column(heading, justify="right")
    for name, each in metrics["findings"].items():
        cells = [str(each["positives"]), *_cells(each), _number(each["prevalence"])]
        table.add_row(escape(name), *cells, *([str(each["unknown"])] if has_unknown else []))
    table.add_section()
    titles = {"macro": "mean of findings", "weighted": "weighted mean", "micro": "all decisions"}
    for name, title in titles.items():
        table.add_row(title, "", *_cells(metrics["means"][name]))
    if "auroc_macro_with_no_finding" in metrics:
        table.add_row("with No Finding", "", _number(metrics["auroc_macro_with_no_finding"]))
    console.print(table)
    for line in [f"macro AUROC {_mean_text(metrics)}", *_remarks(metrics), NOTICE]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(scores: Dict[str, Any]) -> List[str]:
    """Return AUROC with its interval, and average precision: ``"0.9132 (0.901-0.924)"``."""
    auroc, precision = scores["auroc"], scores["average_precision"]
    text = _number(auroc and auroc["value"])
    if auroc is not None and auroc["low"] is not None:
        text += f" ({auroc['low']:.3f}-{auroc['high']:.3f})"
    return [text, _number(precision and precision["value"])]


def _remarks(metrics: Dict[str, Any]) -> List[str]:
    """Return what is to be known of the numbers: how the intervals are made, and what lacks one."""
    findings, how = metrics["findings"], metrics["intervals"]
    lines = []
    if how["resamples"] and how["patients"] >= LEAST_PATIENTS:
        lines.append(
            f"intervals: {how['method']}, {how['resamples']:,} resamples of {how['patients']:,}"
            " patients"
        )
    undefined = [name for name, each in findings.items() if each["auroc"] is None]
    if undefined:
        lines.append(f"undefined (no positive or no negative image): {', '.join(undefined)}")
    without = [
        name for name, each in findings.items() if each["auroc"] and each["auroc"]["low"] is None
    ]
    if without and how["resamples"]:
        lines.append(
            f"no interval (less than {LEAST_PATIENTS} patients with a positive or with a negative"
            f" image, or the same score in every resample): {', '.join(without)}"
        )
    differing = [
        name for name, each in findings.items() if each["delong"] and not each["delong"]["agrees"]
    ]
    if differing:
        lines.append(
            f"DeLong's interval, which takes images as independent, differs: {', '.join(differing)}"
        )
    return lines


def _mean_text(metrics: Dict[str, Any]) -> str:
    """Format the mean AUROC: ``"0.9132 (13 of 14 findings)"``."""
    total = metrics["num_findings"]
    if metrics["auroc_macro"] is None:
        return f"undefined (0 of {total} findings)"
    return f"{metrics['auroc_macro']:.4f} ({metrics['auroc_defined']} of {total} findings)"


def _number(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.4f}"
