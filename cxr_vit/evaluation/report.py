"""predictions.csv: one row an image, truth and probability a finding, in the split's order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cxr_vit.data.nih import Records
from cxr_vit.evaluation.figures import roc_figure
from cxr_vit.evaluation.metrics import evaluate, probabilities

__all__ = ["print_table", "write_predictions", "write_report"]


def write_predictions(
    path: Path, records: Records, *, split: str, names: Sequence[str], logits: Tensor
) -> None:
    """Write `image, patient, split`, then `<finding>` (0/1) and `<finding>_probability` each.

    Written aside and renamed.

    Parameters
    ----------
    path
        The CSV.
    records
        The split's images, in the order of `logits`.
    split
        Its name.
    names
        The C label names.
    logits
        float32 ``[N, C]``.
    """
    probs = probabilities(logits).numpy()
    assert probs.shape == (len(records), len(names))
    columns = {
        "image": records.table["image"].to_numpy(),
        "patient": records.table["patient"].to_numpy(),
        "split": np.full(len(records), split),
    }
    for column, name in enumerate(names):
        columns[name] = records.labels[:, column]
        columns[f"{name}_probability"] = probs[:, column]
    aside = path.with_name(f".{path.name}.writing")
    pd.DataFrame(columns).to_csv(aside, index=False)
    aside.replace(path)


NOTICE = "For research only; not a medical device."


def write_report(
    folder: Path,
    records: Records,
    *,
    split: str,
    names: Sequence[str],
    logits: Tensor,
    labels: Tensor,
    origin: Dict[str, Any],
) -> Dict[str, Any]:
    """Score a split and write the report's files; return the content of metrics.json.

    Parameters
    ----------
    folder
        Made if it is not there; files of the same names are replaced.
    records
        The split's images, in the order of `logits`.
    split
        Its name.
    names
        The C label names.
    logits, labels
        float32 ``[N, C]``.
    origin
        JSON-able facts to keep with the numbers: checkpoint, step, data hashes.
    """
    assert len(records) == len(logits), "every image of the split is scored once"
    metrics = {"split": split, **evaluate(logits, labels, names), **origin, "notice": NOTICE}
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.csv", records, split=split, names=names, logits=logits)
    title = f"ROC on {split}, {len(records)} images, macro AUROC {mean_text(metrics)}"
    figure = roc_figure(logits, labels, names, title=title)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"roc.{suffix}", dpi=100)
    aside = folder / ".metrics.json.writing"
    aside.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    aside.replace(folder / "metrics.json")  # last: where it is, the report is whole
    return metrics


def mean_text(metrics: Dict[str, Any]) -> str:
    """Write the mean AUROC and of how many findings: ``"0.9132 (13 of 14 findings)"``."""
    total = metrics["num_findings"]
    if metrics["auroc_macro"] is None:
        return f"undefined (0 of {total} findings)"
    return f"{metrics['auroc_macro']:.4f} ({metrics['auroc_defined']} of {total} findings)"


def print_table(metrics: Dict[str, Any], console: Console) -> None:
    """Print a row a label and the means."""
    table = Table(title=f"{metrics['split']}: {metrics['num_samples']} images")
    table.add_column("finding", no_wrap=True)
    for heading in ("positive", "AUROC", "avg. precision", "prevalence"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, auroc in metrics["auroc"].items():
        positives = metrics["positives"][name]
        table.add_row(
            name,
            str(positives),
            _number(auroc),
            _number(metrics["average_precision"][name]),
            _number(positives / metrics["num_samples"]),
        )
    table.add_section()
    macro = _number(metrics["auroc_macro"]), _number(metrics["average_precision_macro"])
    table.add_row("mean of findings", "", *macro, "")
    if "auroc_macro_with_no_finding" in metrics:
        mean_of_all = _number(metrics["auroc_macro_with_no_finding"])
        table.add_row("with No Finding", "", mean_of_all, "", "")
    console.print(table)
    console.print(f"macro AUROC {mean_text(metrics)}", highlight=False)
    undefined: List[str] = [name for name, auroc in metrics["auroc"].items() if auroc is None]
    if undefined:
        console.print(f"undefined (no positive or no negative image): {', '.join(undefined)}")
    console.print(NOTICE)


def _number(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.4f}"
