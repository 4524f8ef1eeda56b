"""The report of a split: predictions.csv, metrics.json, ROC curves, and a table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cxr_vit.config.columns import IMAGE_COLUMNS, probability_column
from cxr_vit.data.records import UNKNOWN, Records
from cxr_vit.data.text_files import write_csv
from cxr_vit.evaluation.figures import roc_figure
from cxr_vit.evaluation.metrics import EvalOutputs, evaluate, probabilities
from cxr_vit.files import replacing, write_text, writing_to

NOTICE = "For research only; not a medical device."


def write_report(
    folder: Path,
    records: Records,
    outputs: EvalOutputs,
    *,
    names: Sequence[str],
    origin: Dict[str, Any],
) -> Dict[str, Any]:
    """Write the files of the report of a scored split; return the content of metrics.json.

    `records` are in the order of the outputs. `origin` are JSON-able facts to store with the
    scores: checkpoint, step, data hashes. Raises DataError if the folder cannot be written.
    """
    split, logits, labels = outputs.split, outputs.logits, outputs.labels
    assert len(records) == len(logits), "every image of the split is scored once"
    metrics = {"split": split, **evaluate(logits, labels, names), **origin, "notice": NOTICE}
    predictions = _predictions(records, outputs, names)
    title = f"ROC on {split}, {len(records)} images, macro AUROC {_mean_text(metrics)}"
    figure = roc_figure(logits, labels, names, title=title)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "predictions.csv", predictions)
        for suffix in ("png", "svg"):
            with replacing(folder / f"roc.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=100)
        # Written last: where it exists, the report is complete.
        write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _predictions(records: Records, outputs: EvalOutputs, names: Sequence[str]) -> pd.DataFrame:
    """Return one row per image, in the order of `records`: its labels and probabilities.

    An unknown label is None.
    """
    table = records.table[["image", "patient"]].reset_index(drop=True)
    table = table.assign(split=outputs.split)[list(IMAGE_COLUMNS)]
    probs, labels = probabilities(outputs.logits).numpy(), outputs.labels.int().numpy()
    for column, name in enumerate(names):
        of_name = pd.Series(labels[:, column], dtype=object)
        table[name] = of_name.where(of_name != UNKNOWN, None)
        table[probability_column(name)] = probs[:, column]
    return table


def print_table(metrics: Dict[str, Any], console: Optional[Console] = None) -> None:
    """Print one row per label, and the means; a column of unknown labels if there are any."""
    console = console or Console()
    table = Table(title=f"{metrics['split']}: {metrics['num_samples']} images")
    table.add_column("finding", no_wrap=True)
    unknown: Dict[str, int] = metrics.get("unknown", {})
    headings = ["positive", "AUROC", "avg. precision", "prevalence"]
    for heading in [*headings, "unknown"] if unknown else headings:
        table.add_column(heading, justify="right")
    for name, auroc in metrics["auroc"].items():
        positives, without = metrics["positives"][name], unknown.get(name, 0)
        known = metrics["num_samples"] - without
        prevalence = positives / known if known else None
        numbers = (auroc, metrics["average_precision"][name], prevalence)
        counts = [str(without)] if unknown else []
        table.add_row(escape(name), str(positives), *map(_number, numbers), *counts)
    table.add_section()
    macro = _number(metrics["auroc_macro"]), _number(metrics["average_precision_macro"])
    table.add_row("mean of findings", "", *macro)
    if "auroc_macro_with_no_finding" in metrics:
        mean_of_all = _number(metrics["auroc_macro_with_no_finding"])
        table.add_row("with No Finding", "", mean_of_all)
    console.print(table)
    console.print(f"macro AUROC {_mean_text(metrics)}", highlight=False)
    undefined = [name for name, auroc in metrics["auroc"].items() if auroc is None]
    if undefined:
        listed = escape(", ".join(undefined))
        console.print(f"undefined (no positive or no negative image): {listed}")
    console.print(NOTICE)


def _mean_text(metrics: Dict[str, Any]) -> str:
    """Format the mean AUROC: ``"0.9132 (13 of 14 findings)"``."""
    total = metrics["num_findings"]
    if metrics["auroc_macro"] is None:
        return f"undefined (0 of {total} findings)"
    return f"{metrics['auroc_macro']:.4f} ({metrics['auroc_defined']} of {total} findings)"


def _number(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.4f}"
