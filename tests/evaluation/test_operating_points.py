"""Thresholds of labels: how they are fitted, stored and applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    brier_score_loss,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
)

from cxr_vit.data.labels import FINDINGS
from cxr_vit.errors import DataError
from cxr_vit.evaluation.bootstrap import Resamples, limits
from cxr_vit.evaluation.calibration import calibration, expected_calibration_error, reliability
from cxr_vit.evaluation.operating_points import (
    OperatingPoints,
    apply,
    data_sha256,
    fit_thresholds,
)
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.evaluation.scaling import scaled
from cxr_vit.evaluation.statistics import clipped

KINDS = ("youden", "f1", "specificity_95", "sensitivity_95")
NAMES = ("Mass", "Hernia", "Edema", "Nodule")


def _predictions(images: int = 400, seed: int = 0, split: str = "val") -> Predictions:
    """Return scored images: Mass and Nodule as usual, Hernia never, Edema unknown for many."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(-1, 1.5, (images, 4))
    rates = 1 / (1 + np.exp(-0.6 * logits))
    labels = (generator.random((images, 4)) < rates).astype(np.int8)
    labels[:, 1] = 0
    labels[::3, 2] = -1
    table = pd.DataFrame(
        {
            "image": [f"{index:05d}.png" for index in range(images)],
            "patient": [str(index // 3) for index in range(images)],
            "split": split,
        }
    )
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return Predictions(NAMES, table, labels, probabilities, np.full((images, 4), np.nan))


# Fitting


def _best(probabilities: Any, truth: Any, kind: str) -> Any:
    """Try every probability as the threshold, from the highest; return the first best one."""
    best, chosen = -1.0, None
    for threshold in sorted(set(probabilities.tolist()), reverse=True):
        above = probabilities >= threshold
        sensitivity = recall_score(truth, above)
        specificity = recall_score(truth, above, pos_label=0)
        goal = {
            "youden": round(sensitivity + specificity, 12),
            "f1": f1_score(truth, above),
            "specificity_95": sensitivity if specificity >= 0.95 else -1,
            "sensitivity_95": specificity if sensitivity >= 0.95 else -1,
        }[kind]
        if goal > best:
            best, chosen = goal, threshold
    return chosen


@pytest.mark.parametrize("digits", [1, 2, 8])
def test_thresholds_are_the_best_of_all(digits: int) -> None:
    for seed in range(2):
        generator = np.random.default_rng(seed)
        truth = (generator.random(80) < 0.3).astype(np.int8)
        scores = np.round(np.clip(generator.normal(0.4 + 0.2 * truth, 0.2), 0, 1), digits)
        probabilities = scores.astype(np.float32)
        expected = {kind: _best(probabilities, truth, kind) for kind in KINDS}
        found = fit_thresholds(probabilities, truth)
        assert found == {kind: value for kind, value in expected.items() if value is not None}
        assert set(found.values()) <= set(probabilities.tolist())


def test_thresholds_of_perfect_constant_and_reversed_scores() -> None:
    truth = np.repeat([0, 1], [80, 20]).astype(np.int8)
    perfect = np.linspace(0, 1, 100, dtype=np.float32)
    found = fit_thresholds(perfect, truth)
    assert found["youden"] == found["f1"] == found["specificity_95"] == float(perfect[80])
    assert found["sensitivity_95"] == float(perfect[81]), "19 of 20 positives are 95 %"
    constant = fit_thresholds(np.full(100, 0.25, np.float32), truth)
    assert constant == {"youden": 0.25, "f1": 0.25, "sensitivity_95": 0.25}
    reverse = fit_thresholds(perfect[::-1], truth)
    assert reverse["sensitivity_95"] == float(perfect[1])
    assert reverse["youden"] == 0.0, "sensitivity + specificity is at most 1"


@pytest.mark.parametrize(("positives", "negatives"), [(0, 30), (9, 30), (30, 9), (0, 0)])
def test_label_with_few_positives_or_negatives_has_no_threshold(
    positives: int, negatives: int
) -> None:
    truth = np.repeat([1, 0], [positives, negatives]).astype(np.int8)
    assert fit_thresholds(np.linspace(0, 1, len(truth), dtype=np.float32), truth) == {}


def test_ratios_of_few_patients_have_no_interval() -> None:
    predictions = _predictions(120)
    points = OperatingPoints.fit(predictions)
    positive = np.flatnonzero(predictions.labels[:, 0] == 1)
    for patients in (9, 10):
        predictions.table.loc[positive, "patient"] = [f"x{row % patients}" for row in positive]
        found = apply(points, predictions, Resamples(50))["points"]["Mass"]["youden"]
        assert found["sensitivity"]["value"] is not None
        assert (found["sensitivity"]["low"] is not None) == (patients == 10)
        assert found["specificity"]["low"] is not None


def test_points_leave_out_what_cannot_be_fitted() -> None:
    predictions = _predictions()
    points = OperatingPoints.fit(predictions, model_sha256="a" * 64)
    assert points.labels == list(NAMES)
    assert set(points.thresholds) == set(points.temperature) == {"Mass", "Edema", "Nodule"}
    assert points.fitted_on == {
        "split": "val",
        "images": 400,
        "patients": 134,
        "sha256": data_sha256(NAMES, predictions.table["image"], predictions.labels),
        "model_sha256": "a" * 64,
    }
    known = predictions.labels[:, 2] != -1
    edema = predictions.probabilities[known, 2], predictions.labels[known, 2]
    assert points.thresholds["Edema"] == fit_thresholds(*edema), "unknown labels are left out"


def test_hash_of_the_data_has_names_images_and_labels() -> None:
    labels = np.int8([[0, 1], [-1, 0]])
    same = data_sha256(["a", "b"], ["1", "2"], labels)
    assert same == data_sha256(("a", "b"), pd.Series(["1", "2"]), labels.astype(np.int64))
    others = [
        data_sha256(["b", "a"], ["1", "2"], labels),
        data_sha256(["a", "b"], ["2", "1"], labels),
        data_sha256(["a", "b"], ["1", "2"], np.abs(labels)),
    ]
    assert len({same, *others}) == 4


# The file


def test_file_is_read_as_written(tmp_path: Path) -> None:
    points = OperatingPoints.fit(_predictions())
    points.write(tmp_path / "points.json")
    assert OperatingPoints.read(tmp_path / "points.json") == points
    assert [path.name for path in tmp_path.iterdir()] == ["points.json"]
    before = (tmp_path / "points.json").read_text()
    OperatingPoints.read(tmp_path / "points.json").write(tmp_path / "points.json")
    assert (tmp_path / "points.json").read_text() == before


def _content() -> Dict[str, Any]:
    content: Dict[str, Any] = json.loads(OperatingPoints.fit(_predictions()).model_dump_json())
    return content


_DELETED = object()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["thresholds"], _DELETED, "thresholds: Field required"),
        (["format"], 2, "format: "),
        (["format"], _DELETED, "format: "),
        (["labels"], [], "labels: "),
        (["labels"], ["Mass\x1b[2J"], "labels"),
        (["labels"], ["Mass"], "thresholds has 'Edema', which is none of the labels"),
        (["platt", "Pneumonia"], [1.0, 0.0], "platt has 'Pneumonia'"),
        (["thresholds", "Mass", "youden"], 1.5, "thresholds.Mass.youden: "),
        (["thresholds", "Mass", "youden"], -0.1, "thresholds.Mass.youden: "),
        (["thresholds", "Mass", "youden"], "0.5", "thresholds.Mass.youden: "),
        (["thresholds", "Mass", "youden"], True, "thresholds.Mass.youden: "),
        (["thresholds", "Mass", "best"], 0.5, "thresholds.Mass.best"),
        (["temperature", "Mass"], 0.0, "temperature.Mass: "),
        (["temperature", "Mass"], 1e-310, "temperature.Mass: "),
        (["platt", "Mass"], [1e300, 0.0], "platt.Mass.0: "),
        (["temperature", "Mass"], float("inf"), "temperature.Mass: "),
        (["temperature", "Mass"], float("nan"), "temperature.Mass: "),
        (["platt", "Mass"], [1.0], "platt.Mass"),
        (["platt", "Mass"], [-1.0, 0.0], "platt.Mass"),
        (["fitted_on", "images"], 0, "fitted_on.images: "),
        (["fitted_on", "images"], _DELETED, "fitted_on.images: "),
        (["fitted_on", "sha256"], "no hash", "fitted_on.sha256: "),
        (["fitted_on", "other"], 1, "fitted_on.other: "),
        (["other"], 1, "other: "),
    ],
)
def test_wrong_file_is_refused(tmp_path: Path, place: List[str], value: Any, words: str) -> None:
    content = _content()
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if value is _DELETED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    path = tmp_path / "points.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as raised:
        OperatingPoints.read(path)
    assert str(raised.value).startswith(f"{path}: ") and words in str(raised.value)
    assert "Remove it" in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"labels": ["\\ud800"]}'])
def test_file_that_is_no_such_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "points.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"no operating points can be read \(.*Remove it"):
        OperatingPoints.read(path)


def test_file_that_is_missing_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        OperatingPoints.read(tmp_path / "points.json")
    with (tmp_path / "points.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(DataError, match="more than the limit"):
        OperatingPoints.read(tmp_path / "points.json")


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from(sorted(_content())), value=_json)
def test_any_json_is_read_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "points.json"
    path.write_text(json.dumps({**_content(), key: value}))
    try:
        points = OperatingPoints.read(path)
    except DataError:
        return
    apply(points, _predictions(20), Resamples(2))
    calibration(points, _predictions(20))


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(-1, 1)), min_size=1, max_size=60))
def test_any_fit_is_read_as_written(tmp_path: Path, images: List[Tuple[float, int]]) -> None:
    count = len(images)
    predictions = Predictions(
        ("Mass",),
        pd.DataFrame({"image": [*map(str, range(count))], "patient": "1", "split": "val"}),
        np.array([[truth] for _, truth in images], np.int8),
        np.array([[probability] for probability, _ in images], np.float32),
        np.full((count, 4), np.nan, np.float32),
    )
    points = OperatingPoints.fit(predictions)
    points.write(tmp_path / "points.json")
    assert OperatingPoints.read(tmp_path / "points.json") == points
    for chosen in apply(points, predictions, Resamples(2))["points"].get("Mass", {}).values():
        assert (predictions.probabilities == np.float32(chosen["threshold"])).any()


# Applying


def test_decisions_are_those_of_scikit_learn() -> None:
    points = OperatingPoints.fit(_predictions())
    test = _predictions(500, seed=1, split="test")
    section = apply(points, test, Resamples(20))
    assert json.loads(json.dumps(section)) == section
    assert section["fitted_on"] == {
        key: points.fitted_on[key]  # type: ignore[literal-required]
        for key in ("split", "images", "sha256")
    }
    assert set(section["points"]) == {"Mass", "Edema", "Nodule"}
    for name, kinds in section["points"].items():
        assert set(kinds) == set(KINDS)
        column = NAMES.index(name)
        known = test.labels[:, column] != -1
        truth = test.labels[known, column]
        for found in kinds.values():
            above = test.probabilities[known, column] >= found["threshold"]
            counts = [
                *(found["true_negatives"], found["false_positives"]),
                *(found["false_negatives"], found["true_positives"]),
            ]
            assert counts == confusion_matrix(truth, above).ravel().tolist()
            expected = {
                "sensitivity": recall_score(truth, above),
                "specificity": recall_score(truth, above, pos_label=0),
                "ppv": precision_score(truth, above),
                "npv": precision_score(truth, above, pos_label=0),
            }
            for ratio, value in expected.items():
                assert found[ratio]["value"] == pytest.approx(value, rel=1e-12)
                assert found[ratio]["low"] <= value <= found[ratio]["high"]


def test_points_hold_on_the_images_that_they_were_fitted_on() -> None:
    predictions = _predictions()
    applied = apply(OperatingPoints.fit(predictions), predictions, Resamples(0))["points"]
    for kinds in applied.values():
        assert kinds["specificity_95"]["specificity"]["value"] >= 0.95
        assert kinds["sensitivity_95"]["sensitivity"]["value"] >= 0.95
        assert kinds["youden"]["sensitivity"]["low"] is None, "without resamples"


def test_intervals_are_those_of_a_slow_loop() -> None:
    predictions = _predictions(90)
    points = OperatingPoints.fit(predictions)
    resamples = Resamples(50, seed=3)
    found = apply(points, predictions, resamples)["points"]["Mass"]["youden"]
    patients, values = predictions.patients, []
    for index in range(50):
        weights = resamples.weights(index, 30)
        rows = np.repeat(np.arange(90), weights[patients])
        above = predictions.probabilities[rows, 0] >= found["threshold"]
        values.append(recall_score(predictions.labels[rows, 0], above))
    low, high = limits(np.array(values))
    assert (found["sensitivity"]["low"], found["sensitivity"]["high"]) == (low, high)


def test_what_is_undefined_is_none() -> None:
    predictions = _predictions(60)
    points = OperatingPoints.fit(predictions)
    other = _predictions(60, seed=1)
    other.labels[:, 0], other.labels[:, 3] = 0, -1
    found = apply(points, other, Resamples(10))["points"]
    mass, nodule = found["Mass"]["youden"], found["Nodule"]["youden"]
    assert mass["sensitivity"] is None and mass["specificity"] is not None
    assert mass["ppv"] == {"value": 0.0, "low": None, "high": None}, "no resample has another"
    ratios = ("sensitivity", "specificity", "ppv", "npv")
    assert [nodule[ratio] for ratio in ratios] == [None] * 4
    assert nodule["true_positives"] == nodule["false_negatives"] == 0


def test_labels_of_other_data_have_points_where_the_names_are_equal() -> None:
    points = OperatingPoints.fit(_predictions())
    test = _predictions(50)
    other = Predictions(
        ("Nodule", "Fracture"),
        test.table,
        test.labels[:, [3, 0]],
        test.probabilities[:, [3, 0]],
        test.relabels,
    )
    section = apply(points, other, Resamples(2))["points"]
    assert section == {"Nodule": apply(points, test, Resamples(2))["points"]["Nodule"]}
    none = Predictions(
        ("Fracture",), test.table, test.labels[:, :1], test.probabilities[:, :1], test.relabels
    )
    assert apply(points, none, Resamples(2))["points"] == {}
    assert calibration(points, none) == {"Fracture": None}


# Calibration


def test_calibration_is_that_of_scikit_learn() -> None:
    points = OperatingPoints.fit(_predictions())
    test = _predictions(500, seed=1)
    section = calibration(points, test)
    assert json.loads(json.dumps(section)) == section
    assert list(section) == list(NAMES) and section["Hernia"] is None
    edema = section["Edema"]
    known = test.labels[:, 2] != -1
    truth, plain = test.labels[known, 2], test.probabilities[known, 2]
    slope, intercept = points.platt["Edema"]
    assert (edema["temperature"], edema["platt"]) == (
        points.temperature["Edema"],
        [slope, intercept],
    )
    for key, probabilities in {
        "before": plain.astype(np.float64),
        "temperature_scaled": scaled(plain, 1 / edema["temperature"]),
        "platt_scaled": scaled(plain, slope, intercept),
    }.items():
        found = edema[key]
        assert found["brier"] == pytest.approx(brier_score_loss(truth, probabilities), rel=1e-9)
        assert found["log_loss"] == pytest.approx(log_loss(truth, clipped(probabilities)), rel=1e-9)
        error = expected_calibration_error(probabilities, truth)
        assert found["expected_calibration_error"] == pytest.approx(error, rel=1e-9)
        bins = reliability(probabilities, truth)
        assert np.allclose(found["bins"], np.stack(bins, axis=1), rtol=1e-12)
        assert sum(count for *_, count in found["bins"]) == known.sum()


def test_scaling_helps_where_it_was_fitted() -> None:
    predictions = _predictions(2000)
    for name, found in calibration(OperatingPoints.fit(predictions), predictions).items():
        if name != "Hernia":
            losses = [
                found[key]["log_loss"] for key in ("platt_scaled", "temperature_scaled", "before")
            ]
            assert losses == sorted(losses)


def test_label_with_one_scaling_has_no_values_of_the_other() -> None:
    predictions = _predictions()
    points = OperatingPoints.fit(predictions)
    alone = points.model_copy(update={"temperature": {}})
    found = calibration(alone, predictions)["Mass"]
    assert found["temperature"] is None and found["temperature_scaled"] is None
    assert found["platt_scaled"] == calibration(points, predictions)["Mass"]["platt_scaled"]


# Real labels


NIH = (
    Path(__file__).resolve().parents[3] / "shared" / "data" / "nih" / "Data_Entry_2017_v2020.csv.gz"
)


@pytest.mark.skipif(not NIH.is_file(), reason=f"the real NIH labels are not available ({NIH})")
def test_numbers_of_real_labels_are_those_of_scikit_learn() -> None:
    csv = pd.read_csv(NIH, usecols=["Image Index", "Finding Labels", "Patient ID"])
    labels = np.stack([csv["Finding Labels"].str.contains(name) for name in FINDINGS], axis=1)
    logits = np.random.default_rng(0).normal(-2 + 1.2 * labels, 1.2)
    table = pd.DataFrame(
        {"image": csv["Image Index"], "patient": csv["Patient ID"], "split": "val"}
    )
    probabilities = np.round(1 / (1 + np.exp(-logits)), 3).astype(np.float32)  # with ties
    relabels = np.full((len(csv), 4), np.nan, np.float32)
    whole = Predictions(FINDINGS, table, labels.astype(np.int8), probabilities, relabels)
    is_test = (csv["Patient ID"] % 4 == 0).to_numpy()
    points, test = OperatingPoints.fit(whole.take(~is_test)), whole.take(is_test)
    applied, calibrated = apply(points, test, Resamples(5))["points"], calibration(points, test)
    for column, name in enumerate(FINDINGS):
        truth, probability = test.labels[:, column], test.probabilities[:, column].astype(float)
        assert set(applied[name]) == set(KINDS)
        for found in applied[name].values():
            above = probability >= found["threshold"]
            expected = precision_recall_fscore_support(truth, above, labels=[0, 1])
            assert found["npv"]["value"] == pytest.approx(expected[0][0], rel=1e-9)
            assert found["ppv"]["value"] == pytest.approx(expected[0][1], rel=1e-9)
            assert found["specificity"]["value"] == pytest.approx(expected[1][0], rel=1e-9)
            assert found["sensitivity"]["value"] == pytest.approx(expected[1][1], rel=1e-9)
            assert found["true_positives"] + found["false_negatives"] == truth.sum()
        found = calibrated[name]["platt_scaled"]
        slope, intercept = points.platt[name]
        kept = clipped(probability)
        line = slope * np.log(kept / (1 - kept)) + intercept
        scores = 1 / (1 + np.exp(-line))
        assert found["brier"] == pytest.approx(brier_score_loss(truth, scores), rel=1e-9)
        assert found["log_loss"] == pytest.approx(log_loss(truth, scores), rel=1e-9)
        assert found["log_loss"] < calibrated[name]["before"]["log_loss"]
