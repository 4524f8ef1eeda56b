"""Compare models on the images that all have scored: which differences are more than noise.

The first model is the baseline. Every resample draws the same patients for all models, so that
what is easy or hard in an image cancels in the difference.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_uppercase
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cxr_vit.data.records import UNKNOWN
from cxr_vit.errors import DataError
from cxr_vit.evaluation.bootstrap import (
    LEAST_PATIENTS,
    LEVEL,
    Progress,
    Resamples,
    defined,
    limits,
    replicate,
)
from cxr_vit.evaluation.predictions import Predictions, read_predictions
from cxr_vit.evaluation.statistics import joined, ranking

#: Scores that are compared, and their headings.
SCORES = {"auroc": "AUROC", "average_precision": "average precision"}
#: A p-value below this is more than noise.
SIGNIFICANCE = round(1 - LEVEL, 6)
BETTER, WORSE, NOISE = "better", "worse", "no more than noise"
#: There is no interval.
TOO_FEW = "too few patients"
#: The mean over the findings, beside the labels in tables.
MEAN = "mean of findings"
_FORMULA = "2 * min(share of differences <= 0, share >= 0), shares (1 + count) / (1 + resamples)"
#: Names that a message lists.
_SHOWN = 5
#: Labels of a figure; one of more takes long and cannot be read.
_MOST_ROWS = 40
#: Okabe and Ito's colours, which the colour-blind tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "os^Dv"


class Model(NamedTuple):
    """Predictions to compare; `name` is a letter, "A" for the baseline."""

    name: str
    path: Path
    predictions: Predictions


class Pairing(NamedTuple):
    """Models with the same labels, images and truth, in the same order.

    `num_images` are those of each file, and `notes` sentences about what was left out or differs.
    """

    models: List[Model]
    num_images: List[int]
    notes: List[str]


# Reading and matching


def read_models(files: Sequence[Path]) -> List[Model]:
    """Read at most 26 predictions.csv files, the baseline first.

    Raises DataError if a file is missing, is no predictions.csv, or has an image twice.
    """
    return [Model(name, path, read_predictions(path)) for name, path in zip(ascii_uppercase, files)]


def pair(models: Sequence[Model]) -> Pairing:
    """Match the rows by `image` and keep what all models have.

    A label that differs between the files is unknown for this image: no file is right for certain.
    Patient and split are the baseline's. Raises DataError if no label or no image is in all files.
    """
    first = models[0].predictions
    names = [n for n in first.names if all(n in model.predictions.names for model in models)]
    images = pd.Index(first.table["image"])
    for model in models[1:]:
        images = images[images.isin(model.predictions.table["image"])]
    _refuse_nothing_common(models, names, images)
    taken = [_rows_of(model.predictions, names, images) for model in models]
    truth, notes = _common_truth(taken)
    tables = [each.table for each in taken]
    notes = [
        *_label_notes(models, names),
        *(
            _left_out(model, len(images))
            for model in models
            if len(model.predictions) > len(images)
        ),
        *notes,
        *_column_notes(models, tables),
        *_same_file_notes(models),
    ]
    matched = [
        model._replace(
            predictions=Predictions(
                tuple(names), tables[0], truth, each.probabilities, each.relabels
            )
        )
        for model, each in zip(models, taken)
    ]
    return Pairing(matched, [len(model.predictions) for model in models], notes)


def _refuse_nothing_common(models: Sequence[Model], names: List[str], images: pd.Index) -> None:
    first = models[0]
    if not names:
        has = "; ".join(f"{m.name}: {_listed(m.predictions.names)}" for m in models)
        raise DataError(f"no label is in all of the files ({has}). Compare models of one task.")
    if images.empty:
        examples = "; ".join(
            f"{m.path} has {len(m.predictions)}, such as {m.predictions.table['image'].iloc[0]!r}"
            for m in models
        )
        raise DataError(
            f"no image of {first.path} is in all of the other files: {examples}. Score the same"
            " split of the same data set with each."
        )


def _rows_of(predictions: Predictions, names: Sequence[str], images: pd.Index) -> Predictions:
    """Return these labels and images, in their order."""
    rows = pd.Index(predictions.table["image"]).get_indexer(images)
    columns = [predictions.names.index(name) for name in names]
    taken = predictions.take(rows)
    labels, probs = taken.labels[:, columns], taken.probabilities[:, columns]
    return Predictions(tuple(names), taken.table, labels, probs, taken.relabels)


def _common_truth(taken: Sequence[Predictions]) -> Tuple[np.ndarray, List[str]]:
    """Return the labels, unknown where they differ, and a sentence if any does."""
    labels = np.stack([each.labels for each in taken])
    differs = (labels != labels[0]).any(axis=0)
    truth = np.where(differs, np.int8(UNKNOWN), labels[0])
    if not differs.any():
        return truth, []
    counts = dict(zip(taken[0].names, differs.sum(axis=0).tolist()))
    listed = _listed([f"{name} of {count}" for name, count in counts.items() if count])
    return truth, [
        f"labels differ between the files for {differs.any(axis=1).sum()} of {len(truth)} images"
        f" ({listed}): these labels are left out"
    ]


def _label_notes(models: Sequence[Model], names: Sequence[str]) -> List[str]:
    every = dict.fromkeys(name for model in models for name in model.predictions.names)
    missing = [name for name in every if name not in names]
    return [f"labels that not all files have are left out: {_listed(missing)}"] if missing else []


def _left_out(model: Model, kept: int) -> str:
    total = len(model.predictions)
    return f"{total - kept} of {total} images of {model.name} are left out: not all files have them"


def _column_notes(models: Sequence[Model], tables: Sequence[pd.DataFrame]) -> List[str]:
    """Return sentences about the images whose split or patient is another one than in A."""
    notes = []
    for model, table in zip(models[1:], tables[1:]):
        for column in ("split", "patient"):
            own, other = table[column], tables[0][column]
            differs = (own != other).to_numpy(dtype=bool)
            if differs.any():
                row = int(np.argmax(differs))
                notes.append(
                    f"the {column} of {differs.sum()} of {len(table)} images is another one in"
                    f" {model.name} than in A, such as {own[row]!r} and {other[row]!r} of"
                    f" {table['image'][row]!r}; A's counts"
                )
    return notes


def _same_file_notes(models: Sequence[Model]) -> List[str]:
    given: Dict[Path, str] = {}
    return [
        f"{other} and {model.name} are the same file"
        for model in models
        for other in [given.setdefault(model.path.resolve(), model.name)]
        if other != model.name
    ]


def _listed(names: Sequence[str]) -> str:
    others = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {others} more" if others > 0 else "")


# Differences


def compare(
    pairing: Pairing, resamples: Resamples, progress: Optional[Progress] = None
) -> Dict[str, Any]:
    """Return what comparison.json holds: for each other model the differences to the baseline.

    A label of a comparison has `positives`, `negatives`, and by score `baseline`, `model`,
    `difference` (``{"value", "low", "high"}``), `p`, `p_holm` and `verdict`, or None where it is
    undefined. Holm's method corrects the p-values of one score of one model over the labels; the
    mean of the findings is a hypothesis of its own.
    """
    first = pairing.models[0].predictions
    patients = first.patients
    count = int(patients.max()) + 1
    about = (first.labels, patients, first.names, first.findings)
    statistic = joined(
        {
            model.name: ranking(model.predictions.probabilities, *about, means=("macro",))
            for model in pairing.models
        }
    )
    values = statistic.of(np.ones((1, count), np.int64))[0]
    # A difference of two columns is that of the models in the same resamples.
    drawn = np.concatenate([values[None], replicate(statistic, count, resamples, progress)])
    by_name = dict(zip(statistic.names, drawn.T))
    has_limits = dict(zip(statistic.names, (statistic.fewest >= LEAST_PATIENTS).tolist()))
    comparisons = [
        _comparison(model.name, first, by_name, has_limits) for model in pairing.models[1:]
    ]
    return {
        "schema_version": 1,
        "models": [
            {"name": model.name, "predictions": str(model.path), "images": images}
            for model, images in zip(pairing.models, pairing.num_images)
        ],
        "images": len(first),
        "intervals": {
            "level": LEVEL,
            "method": "percentile bootstrap over patients, paired",
            "resamples": resamples.count,
            "seed": resamples.seed,
            "patients": count,
        },
        "test": {"p": _FORMULA, "p_holm": "Holm over the labels", "significance": SIGNIFICANCE},
        "comparisons": comparisons,
        "warnings": [*pairing.notes, *_doubts(comparisons, resamples)],
    }


def _comparison(
    model: str,
    truth: Predictions,
    by_name: Dict[str, np.ndarray],
    has_limits: Dict[str, bool],
) -> Dict[str, Any]:
    """Return the entry of one model; arrays are the value and then that of each resample."""
    labels: Dict[str, Dict[str, Any]] = {
        name: {"positives": int((known == 1).sum()), "negatives": int((known == 0).sum())}
        for name, known in zip(truth.names, truth.labels.T)
    }
    macro: Dict[str, Any] = {}
    for score in SCORES:
        for name, entry in [*labels.items(), ("macro", macro)]:
            baseline, other = f"A/{score}/{name}", f"{model}/{score}/{name}"
            entry[score] = _difference(by_name[baseline], by_name[other], has_limits[other])
        tested = [entry[score] for entry in labels.values() if (entry[score] or {}).get("p")]
        for each, p in zip(tested, holm([each["p"] for each in tested])):
            each["p_holm"] = p
        for entry in [*labels.values(), macro]:
            if entry[score] is not None:
                entry[score]["verdict"] = _verdict(entry[score])
    return {"model": model, "baseline": "A", "labels": labels, "macro": macro}


def _difference(
    baseline: np.ndarray, model: np.ndarray, has_limits: bool
) -> Optional[Dict[str, Any]]:
    differences = model - baseline
    value, drawn = differences[0], defined(differences[1:])
    if np.isnan(value):
        return None
    if not has_limits:
        drawn = drawn[:0]
    low, high = limits(drawn)
    # Models that are equal in every resample have a p-value of 1, and no limits.
    p = two_sided_p(drawn) if len(drawn) else None
    return {
        "baseline": float(baseline[0]),
        "model": float(model[0]),
        "difference": {"value": float(value), "low": low, "high": high},
        "p": p,
        "p_holm": p,  # of one hypothesis
    }


def two_sided_p(differences: np.ndarray) -> float:
    """Return the two-sided p-value of no difference from those of the resamples.

    It is 2 * min(share <= 0, share >= 0), the level at which the percentile interval ends at 0
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993), at most 1. A share is
    (1 + count) / (1 + resamples), so that it is never 0 (Davison and Hinkley, Bootstrap Methods
    and their Application, 1997).
    """
    counts = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (1 + min(counts)) / (1 + len(differences)))


def holm(p_values: Sequence[float]) -> List[float]:
    """Return adjusted p-values in the same order: one below the level may be called a difference.

    The chance of any false one among all is then at most the level, however they depend on each
    other (Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    given = np.asarray(p_values, np.float64)
    order = np.argsort(given, kind="stable")
    steps = given[order] * np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(p) for p in adjusted]


def _verdict(entry: Dict[str, Any]) -> str:
    if entry["p_holm"] is None:
        return TOO_FEW
    if entry["p_holm"] >= SIGNIFICANCE:
        return NOISE
    return BETTER if entry["difference"]["value"] > 0 else WORSE


def _doubts(comparisons: Sequence[Dict[str, Any]], resamples: Resamples) -> List[str]:
    """Return a sentence if no p-value of a label can be below the level after the correction."""
    entries = list(comparisons[0]["labels"].values())
    tested = max(
        sum((entry[score] or {}).get("p") is not None for entry in entries) for score in SCORES
    )
    needed = round(2 * tested / SIGNIFICANCE)
    if resamples.count >= needed:
        return []
    return [
        f"with {resamples.count} resamples no label can be more than noise after Holm's correction"
        f" over {tested} labels: at least {needed} are needed"
    ]


# Files


def comparison_rows(found: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the rows of comparison.csv: one per model, score and label, and one per mean."""
    return [
        {
            "model": comparison["model"],
            "baseline": comparison["baseline"],
            "score": score,
            "label": name,
            "positives": entry.get("positives"),
            "negatives": entry.get("negatives"),
            **_flat(entry[score]),
        }
        for comparison in found["comparisons"]
        for score in SCORES
        for name, entry in rows_of(comparison)
    ]


def rows_of(comparison: Dict[str, Any]) -> List[Tuple[str, Dict[str, Any]]]:
    """Return the mean of the findings, then the labels, each with its name."""
    return [(MEAN, comparison["macro"]), *comparison["labels"].items()]


def _flat(entry: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    if entry is None:
        keys = ("baseline_value", "model_value", "difference", "low", "high", "p", "p_holm")
        return {**dict.fromkeys(keys), "verdict": "undefined"}
    return {
        "baseline_value": entry["baseline"],
        "model_value": entry["model"],
        "difference": entry["difference"]["value"],
        "low": entry["difference"]["low"],
        "high": entry["difference"]["high"],
        **{key: entry[key] for key in ("p", "p_holm", "verdict")},
    }


def comparison_figure(found: Dict[str, Any], notice: str) -> Figure:
    """Draw the differences to the baseline with their intervals, a panel for each score.

    A filled marker is a difference that is more than noise. Of more than 40 labels, those with the
    most positive images are drawn.
    """
    comparisons = found["comparisons"]
    labels = comparisons[0]["labels"]
    frequent = sorted(labels, key=lambda name: -labels[name]["positives"])[:_MOST_ROWS]
    shown = [name for name in labels if name in frequent]
    height = 1.5 + (1 + len(shown)) * max(0.27, 0.14 * len(comparisons))
    figure = Figure(figsize=(8.0, height), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(SCORES), sharey=True)
    for axis, (score, heading) in zip(axes, SCORES.items()):
        axis.axvline(0, color="0.35", linewidth=1.2, zorder=1)
        for index, comparison in enumerate(comparisons):
            offset = (index - (len(comparisons) - 1) / 2) * 0.7 / len(comparisons)
            rows = [comparison["macro"], *(comparison["labels"][name] for name in shown)]
            _draw(axis, [row[score] for row in rows], offset, index)
        axis.set_xlabel(f"{heading}: difference to A", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.axhline(0.5, color="0.8", linewidth=0.8)
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)
    texts = [MEAN, *(f"{name} ({labels[name]['positives']})" for name in shown)]
    axes[0].set_yticks(range(len(texts)))
    axes[0].set_yticklabels(texts, fontsize=8, parse_math=False)
    axes[0].set_ylim(len(texts) - 0.5, -0.5)
    title = f"{found['images']} images of {found['intervals']['patients']} patients"
    if len(shown) < len(labels):
        title += f"; the {_MOST_ROWS} most frequent of {len(labels)} labels"
    figure.suptitle(f"{title}; lines: {LEVEL:.0%} intervals", fontsize=10)
    handles = [_marker(index, is_filled=True) for index in range(len(comparisons))]
    names = [f"{comparison['model']} - A" for comparison in comparisons]
    filled = [_marker(0, is_filled=True, color="0.2"), _marker(0, is_filled=False, color="0.2")]
    figure.legend(
        [*handles, *filled],
        [*names, "more than noise", NOISE],
        loc="outside lower center",
        ncols=6,
        fontsize=8,
        frameon=False,
        title=notice,
        title_fontsize=8,
    )
    return figure


def _draw(
    axis: Any, entries: Sequence[Optional[Dict[str, Any]]], offset: float, index: int
) -> None:
    for row, entry in enumerate(entries):
        if entry is None:
            continue
        color, y = _COLORS[index % len(_COLORS)], row + offset
        value, low, high = (entry["difference"][key] for key in ("value", "low", "high"))
        if low is not None:
            axis.plot([low, high], [y, y], color=color, linewidth=1.4)
        marker = _marker(index, is_filled=entry["verdict"] in (BETTER, WORSE))
        marker.set_data([value], [y])
        axis.add_line(marker)


def _marker(index: int, *, is_filled: bool, color: str = "") -> Line2D:
    color = color or _COLORS[index % len(_COLORS)]
    face = color if is_filled else "white"
    shape = _MARKERS[index % len(_MARKERS)]
    return Line2D(
        [], [], linestyle="", marker=shape, markersize=5, color=color, markerfacecolor=face
    )
