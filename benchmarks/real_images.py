"""Compare runs on real images: macro AUROC on the test split, with intervals by patient.

    python -m benchmarks.real_images RUN RUN ... [--validated RUN ...] [--draws 1000] [--out FILE]

Each RUN has been trained by `train.py` (or `python -m cxr_vit probe`) and scored by `evaluate.py`.
Of the validated runs only the last validation score is given.
The intervals are percentiles of a bootstrap that draws patients, as their images resemble each
other (Davison and Hinkley 1997, section 3.8). Differences are to the first run, over the same
draws. Prints a row per run and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np
import pandas as pd

from benchmarks.machine import describe_machine
from cxr_vit.cli import run
from cxr_vit.config.columns import IMAGE_COLUMNS, probability_column
from cxr_vit.errors import DataError


class Scored(NamedTuple):
    """The test images of a run, float64 ``[N, C]``, and the number of each patient, ``[N]``."""

    probabilities: np.ndarray
    labels: np.ndarray
    patients: np.ndarray


def read_run(folder: Path) -> Scored:
    """Read predictions.csv of a report."""
    table = pd.read_csv(folder / "report" / "predictions.csv")
    named = [name for name in table if probability_column(name) in table]
    labels = [name for name in named if name not in IMAGE_COLUMNS]
    probabilities = table[[probability_column(name) for name in labels]].to_numpy(float)
    patients = pd.factorize(table["patient"])[0]
    return Scored(probabilities, table[labels].to_numpy(float), patients)


def macro_auroc(scored: Scored, weights: np.ndarray) -> float:
    """Return the mean AUROC of the labels with positives and negatives.

    `weights`, float64 ``[N]``, is how often each image counts.
    """
    values = []
    for column in range(scored.labels.shape[1]):
        order = np.argsort(scored.probabilities[:, column], kind="stable")
        score = scored.probabilities[order, column]
        positive = weights[order] * scored.labels[order, column]
        negative = weights[order] - positive
        if positive.sum() == 0 or negative.sum() == 0:
            continue
        start = np.flatnonzero(np.append(True, np.diff(score) != 0))  # of equal scores
        positives, negatives = (np.add.reduceat(part, start) for part in (positive, negative))
        below = np.cumsum(negatives) - negatives / 2  # half of a tie counts
        values.append(float((positives * below).sum() / positives.sum() / negatives.sum()))
    return float(np.mean(values))


def bootstrap(runs: Sequence[Scored], draws: int, seed: int = 0) -> np.ndarray:
    """Return the macro AUROC of each draw of patients and run, float64 ``[draws, runs]``."""
    random = np.random.default_rng(seed)
    patients = runs[0].patients
    count = int(patients.max()) + 1
    result = np.empty((draws, len(runs)))
    for draw in range(draws):
        weights = np.bincount(random.integers(0, count, count), minlength=count)[patients]
        result[draw] = [macro_auroc(one, weights.astype(float)) for one in runs]
    return result


def facts_of(folder: Path) -> Dict[str, Any]:
    """Return the step of the scored checkpoint and its validation score; nothing of an ensemble."""
    if not (folder / "metrics.jsonl").is_file():
        return {"step": None, "val_auroc_macro": None}
    metrics = json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8"))
    scores = {event["step"]: event["val/auroc_macro"] for event in validations(folder)}
    return {"step": metrics["step"], "val_auroc_macro": round(scores[metrics["step"]], 4)}


def validations(folder: Path) -> List[Dict[str, Any]]:
    """Return the events of a run's metrics.jsonl that have a validation score."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if "val/auroc_macro" in event]


def last_validation(folder: Path) -> Dict[str, Any]:
    """Return the last validation score of a run."""
    event = validations(folder)[-1]
    score = round(event["val/auroc_macro"], 4)
    return {"run": folder.name, "step": event["step"], "val_auroc_macro": score}


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_images")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--validated", type=Path, nargs="+", metavar="RUN", default=[])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    runs = [read_run(folder) for folder in arguments.runs]
    if any(not np.array_equal(one.labels, runs[0].labels) for one in runs):
        raise DataError("the runs were scored on different images or labels.")
    drawn = bootstrap(runs, arguments.draws)
    rows: List[Dict[str, Any]] = []
    for index, (folder, scored) in enumerate(zip(arguments.runs, runs)):
        own, change = drawn[:, index], drawn[:, index] - drawn[:, 0]
        rows.append(
            {
                "run": folder.name,
                **facts_of(folder),
                "test_auroc_macro": round(macro_auroc(scored, np.ones(len(scored.labels))), 4),
                "interval": [round(float(q), 4) for q in np.percentile(own, [2.5, 97.5])],
                "change": [round(float(q), 4) for q in np.percentile(change, [2.5, 50, 97.5])],
            }
        )
        row = rows[-1]
        print(
            f"{row['run']:32} step {row['step'] or 0:5}  val {row['val_auroc_macro'] or 0:.4f}"
            f"  test {row['test_auroc_macro']:.4f} {row['interval']}  change {row['change']}"
        )
    validated = [last_validation(folder) for folder in arguments.validated]
    for row in validated:
        print(f"{row['run']:32} step {row['step']:5}  val {row['val_auroc_macro']:.4f}")
    if arguments.out is not None:
        size = {"images": len(runs[0].labels), "patients": int(runs[0].patients.max()) + 1}
        results = {**size, "draws": arguments.draws, "rows": rows, "validated": validated}
        facts = describe_machine("torch", "transformers", "numpy")
        result = {"command": "python -m benchmarks.real_images ...", **facts, "results": results}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
