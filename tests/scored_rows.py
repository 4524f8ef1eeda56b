"""Predictions with known properties, and the real labels, for the tests of scores."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np
import pandas as pd
import pytest

from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.records import RELABELS
from cxr_vit.evaluation.predictions import Predictions

#: In a checkout or a worktree of it, the folder `shared` is beside one of the parents.
NIH = next(
    (
        folder
        for parent in Path(__file__).resolve().parents
        for folder in [parent / "shared" / "data" / "nih"]
        if folder.is_dir()
    ),
    Path("shared/data/nih"),
)


def make_predictions(
    labels: Any,
    probabilities: Any,
    patients: Optional[Sequence[Any]] = None,
    names: Optional[Sequence[str]] = None,
    **about: Any,
) -> Predictions:
    """Return predictions of ``[N, C]`` labels; each image has a patient of its own by default."""
    labels, probabilities = np.asarray(labels, np.int8), np.asarray(probabilities, np.float32)
    rows, columns = labels.shape
    table = {
        "image": [f"{row}.png" for row in range(rows)],
        "patient": list(range(rows)) if patients is None else list(patients),
        "split": ["test"] * rows,
    }
    return Predictions(
        tuple(names or FINDINGS[:columns]),
        pd.DataFrame({**table, **about}),
        labels,
        probabilities,
        np.full((rows, len(RELABELS)), np.nan, np.float32),
    )


def random_predictions(rows: int, columns: int, *, seed: int, unknown: float = 0.0) -> Predictions:
    """Return predictions better than chance, with ties, of patients with several images."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((rows, columns)) < 0.3).astype(np.int8)
    probabilities = 1 / (1 + np.exp(-generator.normal(labels * 1.5 - 1.0)))
    probabilities[: rows // 2] = np.round(probabilities[: rows // 2], 1)
    labels[generator.random(labels.shape) < unknown] = -1
    return make_predictions(labels, probabilities, generator.integers(0, rows // 3 + 1, rows))


def real_predictions() -> Predictions:
    """Return random scores of the 25,596 test images of ChestX-ray14, 14 labels; or skip."""
    csv, listed = NIH / "Data_Entry_2017_v2020.csv.gz", NIH / "test_list.txt.gz"
    if not (csv.is_file() and listed.is_file()):
        pytest.skip(f"the real labels are not available ({NIH})")
    table = pd.read_csv(csv)
    with gzip.open(listed, "rt") as file:
        table = table[table["Image Index"].isin(file.read().split())].reset_index(drop=True)
    found = table["Finding Labels"].str.split("|")
    labels = np.array([[name in each for name in FINDINGS] for each in found], np.int8)
    generator = np.random.default_rng(0)
    # Findings of one's own deviation from chance; a third of the scores are rounded, for ties.
    logits = generator.normal(labels * generator.uniform(0, 2, len(FINDINGS)) - 2.0)
    probabilities = 1 / (1 + np.exp(-logits))
    probabilities[::3] = np.round(probabilities[::3], 2)
    return make_predictions(labels, probabilities, table["Patient ID"], FINDINGS)
