"""The tables, sentences and files of `compare`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cxr_vit.cli import printable
from cxr_vit.console import progress
from cxr_vit.data.text_files import write_csv
from cxr_vit.evaluation.bootstrap import LEVEL, Resamples
from cxr_vit.evaluation.comparison import (
    BETTER,
    MEAN,
    NOISE,
    SCORES,
    TOO_FEW,
    WORSE,
    compare,
    comparison_figure,
    comparison_rows,
    pair,
    read_models,
    rows_of,
)
from cxr_vit.evaluation.report import NOTICE
from cxr_vit.files import replacing, write_text, writing_to

logger = logging.getLogger(__name__)

_OF_IMAGES = (
    "This is the noise of the choice of images. Other seeds of one recipe differ, too:"
    " compare several runs with summarize."
)


def compare_files(files: Sequence[Path], count: int, seed: int, out: Optional[Path]) -> None:
    """Print how each predictions.csv differs from the first; write the files into `out`."""
    pairing = pair(read_models(files))
    for note in pairing.notes:
        logger.warning("%s", note)
    with progress("resamples", done=0, total=count) as advance:
        found = compare(pairing, Resamples(count, seed), advance)
    for doubt in found["warnings"][len(pairing.notes) :]:
        logger.warning("%s", doubt)
    found["notice"] = NOTICE
    _print(found)
    if out is not None:
        _write(out, found)
        print(f"comparison: {out}")


def _print(found: Dict[str, Any]) -> None:
    console = Console()

    def say(line: str) -> None:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    for model in found["models"]:
        say(f"{model['name']}: {model['predictions']}, {model['images']} images")
    patients, resamples = (found["intervals"][key] for key in ("patients", "resamples"))
    say(f"compared: {found['images']} images of {patients} patients, {resamples} resamples")
    for comparison in found["comparisons"]:
        for score in SCORES:
            say("")
            console.print(_table(comparison, score))
        say("")
        for score in SCORES:
            for line in _sentences(comparison, score):
                say(line)
    say("")
    say(_OF_IMAGES)
    say(NOTICE)


def _table(comparison: Dict[str, Any], score: str) -> Table:
    """Return a table that is 80 columns wide with NIH's findings."""
    model = comparison["model"]
    title = f"{SCORES[score]} of {model} and A; p after Holm's correction over the labels"
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("finding", overflow="fold")
    for heading in ("A", model, f"{model} - A ({LEVEL:.0%} interval)", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, entry in rows_of(comparison):
        is_mean = entry is comparison["macro"]
        table.add_row(escape(printable(name)), *_cells(entry[score]), end_section=is_mean)
    return table


def _cells(entry: Optional[Dict[str, Any]]) -> List[str]:
    if entry is None:
        return ["-", "-", "-", "-", "undefined"]
    p = entry["p_holm"]
    short = {NOISE: "noise", TOO_FEW: "too few"}.get(entry["verdict"], entry["verdict"])
    numbers = [f"{entry[key]:.4f}" for key in ("baseline", "model")]
    return [*numbers, _difference(entry), "-" if p is None else f"{p:.3f}", short]


def _difference(entry: Dict[str, Any]) -> str:
    """Format ``+0.0031 (-0.0123, +0.0184)``."""
    value, low, high = (entry["difference"][key] for key in ("value", "low", "high"))
    return _signed(value) if low is None else f"{_signed(value)} ({_signed(low)}, {_signed(high)})"


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # + 0.0 turns -0.0 into 0.0


def _sentences(comparison: Dict[str, Any], score: str) -> Iterator[str]:
    """Yield in words what the table of a score says."""
    model, heading = comparison["model"], SCORES[score]
    macro, labels = comparison["macro"][score], comparison["labels"]
    if macro is None:
        yield f"{heading}, {MEAN}: undefined, no finding has positive and negative images."
        return
    by_verdict: Dict[str, List[str]] = {}
    for name, entry in labels.items():
        verdict = "undefined" if entry[score] is None else entry[score]["verdict"]
        by_verdict.setdefault(verdict, []).append(name)
    verdict = {BETTER: f"{model} is better than A", WORSE: f"{model} is worse than A"}
    said = verdict.get(macro["verdict"], f"the difference is {macro['verdict']}")
    p = "" if macro["p"] is None else f", p {macro['p']:.3f}"
    yield f"{heading}, {MEAN}: {said}: {_difference(macro)}{p}."
    counts = [
        f"{len(names)} {verdict}" + (f" ({', '.join(names)})" if verdict != NOISE else "")
        for verdict, names in sorted(by_verdict.items())
    ]
    yield f"{heading}, by finding, p after Holm's correction: {'; '.join(counts)}."


def _write(out: Path, found: Dict[str, Any]) -> None:
    figure = comparison_figure(found, NOTICE)
    with writing_to(out):
        write_csv(out / "comparison.csv", pd.DataFrame(comparison_rows(found), dtype=object))
        for suffix in ("png", "svg"):
            with replacing(out / f"comparison.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix)
        # Written last: where it exists, the comparison is complete.
        write_text(out / "comparison.json", json.dumps(found, indent=2) + "\n")
