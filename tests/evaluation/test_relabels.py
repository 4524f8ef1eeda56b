"""Google's labels beside NIH's: counts, scores by scikit-learn, and what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from nih_scores import nih_test_split
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.records import NIH_FINDINGS, RELABELS
from cxr_vit.evaluation.bootstrap import Resamples
from cxr_vit.evaluation.predictions import Predictions, read_predictions
from cxr_vit.evaluation.relabels import relabels

SCORES = {"auroc": roc_auc_score, "average_precision": average_precision_score}


@pytest.fixture
def given() -> Predictions:
    """Return 300 images of 100 patients, of which 200 have Google's labels."""
    rng = np.random.default_rng(0)
    images = [f"{row}.png" for row in range(300)]
    patients = [f"P{row % 100}" for row in range(300)]
    table = pd.DataFrame({"image": images, "patient": patients, "split": "test"})
    labels = rng.choice([-1, 0, 1], (300, 14), p=[0.02, 0.78, 0.2]).astype(np.int8)
    second = np.full((300, 4), np.nan, np.float32)
    second[:200] = rng.integers(0, 2, (200, 4))
    probs = np.round(rng.random((300, 14)), 2).astype(np.float32)
    return Predictions(FINDINGS, table, labels, probs, second)


def reference(given: Predictions, name: str, rows: np.ndarray):
    """Return score, Google's truth and NIH's of these rows where both are known."""
    columns = [FINDINGS.index(label) for label in NIH_FINDINGS[name]]
    second = given.relabels[rows, RELABELS.index(name)]
    kept = ~np.isnan(second)
    scores, google, nih = [], [], []
    for row, answer in zip(rows[kept], second[kept]):
        labels = given.labels[row, columns]
        if 1 in labels or -1 not in labels:
            scores.append(given.probabilities[row, columns].max())
            google.append(int(answer))
            nih.append(int(1 in labels))
    return np.array(scores), np.array(google), np.array(nih)


def test_scores_equal_scikit_learn_on_the_same_images(given: Predictions) -> None:
    check(given, Resamples(0))


def test_scores_of_the_real_labels_equal_scikit_learn() -> None:
    found = check(nih_test_split(), Resamples(20))
    assert [found[name]["images"] for name in found] == [1962] * 3
    assert [found[name]["positives"] for name in found] == [195, 1135, 295]
    cell = found["Pneumothorax"]["auroc"]
    # The scores follow NIH's labels.
    assert cell["google"]["high"] < cell["nih"]["low"]


def check(given: Predictions, resamples: Resamples):
    found = relabels(given, resamples)
    assert found is not None and list(found) == list(NIH_FINDINGS)
    json.dumps(found, allow_nan=False)
    for name, cells in found.items():
        scores, google, nih = reference(given, name, np.arange(len(given)))
        assert cells["nih_findings"] == list(NIH_FINDINGS[name])
        assert cells["images"] == len(scores)
        assert (cells["positives"], cells["nih_positives"]) == (google.sum(), nih.sum())
        for key, score in SCORES.items():
            for truth, values in (("google", google), ("nih", nih)):
                expected = score(values, scores)
                assert cells[key][truth]["value"] == pytest.approx(expected, abs=1e-9)
    return found


def test_intervals_equal_a_loop_over_repeated_rows(given: Predictions) -> None:
    resamples = Resamples(40, seed=1)
    found = relabels(given, resamples)
    assert found is not None
    name = "Airspace opacity"
    replicates = []
    for index in range(resamples.count):
        times = resamples.weights(index, 100)[given.patients]
        scores, google, nih = reference(given, name, np.repeat(np.arange(300), times))
        each = [score(values, scores) for score in SCORES.values() for values in (google, nih)]
        replicates.append(each)
    expected = np.quantile(replicates, [0.025, 0.975], axis=0).T
    cells = [found[name][key][truth] for key in SCORES for truth in ("google", "nih")]
    limits = [[cell["low"], cell["high"]] for cell in cells]
    np.testing.assert_allclose(limits, expected, atol=1e-12)


def test_file_of_predictions_gives_the_same(given: Predictions, tmp_path: Path) -> None:
    given.write(tmp_path / "predictions.csv")
    read = read_predictions(tmp_path / "predictions.csv")
    assert relabels(read, Resamples(9)) == relabels(given, Resamples(9))


def test_findings_that_the_predictions_lack_are_left_out(given: Predictions) -> None:
    columns = [FINDINGS.index(name) for name in ("Nodule", "Edema", "Mass", "Consolidation")]
    names = tuple(FINDINGS[column] for column in columns)
    some = replace(
        given,
        names=names,
        labels=given.labels[:, columns],
        probabilities=given.probabilities[:, columns],
    )
    found = relabels(some, Resamples(0))
    expected = relabels(given, Resamples(0))
    assert found is not None and expected is not None
    assert found == {"Nodule or mass": expected["Nodule or mass"]}
    assert relabels(replace(some, names=("a", "b", "c", "d")), Resamples(0)) is None


def test_without_second_labels_there_is_nothing(given: Predictions) -> None:
    assert relabels(given.take(np.arange(200, 300)), Resamples(9)) is None


def test_one_truth_may_be_undefined(given: Predictions) -> None:
    second = given.relabels.copy()
    second[:, RELABELS.index("Pneumothorax")] *= 0
    found = relabels(replace(given, relabels=second), Resamples(9))
    assert found is not None
    cells = found["Pneumothorax"]
    assert cells["positives"] == 0 and cells["auroc"]["google"] is None
    assert cells["auroc"]["nih"]["value"] > 0 and cells["average_precision"]["google"] is None
