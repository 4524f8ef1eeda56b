"""Groups and gaps against fairlearn, intervals against a loop, and what is too small to score."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from fairlearn.metrics import MetricFrame
from nih_scores import nih_test_split
from sklearn.metrics import roc_auc_score

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.records import RELABELS
from cxr_vit.data.table import read_table_records
from cxr_vit.evaluation.bootstrap import LEAST_PATIENTS, Resamples
from cxr_vit.evaluation.metrics import EvalOutputs
from cxr_vit.evaluation.predictions import Predictions, predictions_of, read_predictions
from cxr_vit.evaluation.subgroups import FEWEST, MOST_GROUPS, subgroups

NONE = Resamples(0)
NAMES = ("Mass", "Nodule", "No Finding")
THRESHOLDS = {"Mass": 0.5, "Nodule": 0.375}


def predictions(
    labels: np.ndarray,
    probs: Optional[np.ndarray] = None,
    patients: Optional[Sequence[int]] = None,
    names: Sequence[str] = NAMES,
    **about: Any,
) -> Predictions:
    count = len(labels)
    if probs is None:
        probs = np.random.default_rng(1).random(labels.shape)
    table = pd.DataFrame(
        {
            "image": [f"{row}.png" for row in range(count)],
            "patient": [f"P{patient}" for patient in (patients or range(count))],
            "split": "test",
            **about,
        }
    )
    relabels = np.full((count, len(RELABELS)), np.nan, np.float32)
    probs = probs.astype(np.float32)
    return Predictions(tuple(names), table, labels.astype(np.int8), probs, relabels)


def random_predictions() -> Predictions:
    """Return 400 images of about 120 patients with tied scores and unknown values of all kinds."""
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 130, 400)
    labels = rng.choice([-1, 0, 1], (400, 3), p=[0.1, 0.6, 0.3])
    probs = np.round(rng.random((400, 3)) * 0.7 + 0.2 * labels.clip(0), 1).clip(0, 1)
    return predictions(
        labels,
        probs,
        patients.tolist(),
        sex=pd.Series(np.array(["M", "F", ""])[patients % 3], dtype=object),
        age=np.where(rng.random(400) < 0.1, np.nan, rng.integers(0, 700, 400) / 10),
        view=pd.Series(rng.choice(["AP", "PA", "LATERAL"], 400), dtype=object),
        follow_up=rng.choice([np.nan, 0, 1, 2], 400),
    )


def false_negative_rate(truth: Any, probs: Any, threshold: float) -> float:
    positives = np.asarray(probs)[np.asarray(truth) == 1]
    return float((positives < threshold).mean()) if len(positives) else math.nan


def frame(
    given: Predictions, column: int, groups: np.ndarray, threshold: float = 0.2
) -> MetricFrame:
    """Score a label of the images of known groups with fairlearn and scikit-learn."""
    kept = (given.labels[:, column] >= 0) & (groups != "")
    return MetricFrame(
        metrics={
            "auroc": roc_auc_score,
            "false_negative_rate": lambda y, p: false_negative_rate(y, p, threshold),
        },
        y_true=given.labels[kept, column],
        y_pred=given.probabilities[kept, column],
        sensitive_features=groups[kept],
    )


def test_groups_and_gaps_equal_fairlearn() -> None:
    given = random_predictions()
    found = subgroups(given, THRESHOLDS, NONE)
    assert list(found) == ["sex", "age", "view", "visit"]
    for attribute, expected in (("sex", ["F", "M"]), ("view", ["AP", "LATERAL", "PA"])):
        groups = given.table[attribute].to_numpy(dtype=object)
        assert list(found[attribute]["groups"]) == expected
        assert found[attribute]["unknown"] == (groups == "").sum()
        for column, name in enumerate(NAMES):
            reference = frame(given, column, groups, THRESHOLDS.get(name, 0.2))
            gaps = reference.difference(method="between_groups")
            for key in ("auroc", "false_negative_rate"):
                if (key, name) == ("false_negative_rate", "No Finding"):
                    continue  # it has no threshold
                for group in expected:
                    cell = found[attribute]["groups"][group][name][key]
                    value = reference.by_group.loc[group, key]
                    assert cell == {"value": pytest.approx(value), "low": None, "high": None}
                gap = found[attribute]["gaps"][name][key]
                by_group = reference.by_group[key].astype(float)
                assert gap["value"] == pytest.approx(gaps[key])
                assert gap["of"] == [by_group.idxmax(), by_group.idxmin()]


def test_groups_of_the_real_test_split_equal_fairlearn() -> None:
    given = nih_test_split()
    found = subgroups(given, dict.fromkeys(given.names, 0.2), Resamples(4))
    json.dumps(found, allow_nan=False)
    age = pd.cut(given.table["age"], [0, 18, 40, 60, 80, 200], right=False)
    groups = {
        "sex": given.table["sex"],
        "age": age.astype(str).map(
            dict(zip(age.cat.categories.astype(str), ["0-17", "18-39", "40-59", "60-79", "80+"]))
        ),
        "view": given.table["view"],
        "visit": given.table["follow_up"].map(lambda number: "follow_up" if number else "first"),
    }
    assert list(found) == list(groups)
    for attribute, values in groups.items():
        each = found[attribute]
        assert set(each["groups"]) == set(values) and each["unknown"] == each["left_out"] == 0
        for group, cells in each["groups"].items():
            rows = (values == group).to_numpy()
            assert cells["images"] == rows.sum()
            assert cells["patients"] == given.table["patient"][rows].nunique()
        for column in range(14):
            check_cells(given, column, values.to_numpy(dtype=object), each)
        macros = [cells["macro"]["auroc"] for cells in each["groups"].values()]
        assert all(macro["low"] < macro["high"] for macro in macros)
    assert "Hernia" not in found["age"]["macro_of"] and len(found["view"]["macro_of"]) == 14


def check_cells(given: Predictions, column: int, groups: np.ndarray, each: Dict[str, Any]) -> None:
    """Compare the groups that are large enough, and the gap between them."""
    name, truth = given.names[column], given.labels[:, column]
    counts = {
        group: [int((truth[groups == group] == value).sum()) for value in (1, 0)]
        for group in each["groups"]
    }
    large = [group for group, both in counts.items() if min(both) >= FEWEST]
    for group, both in counts.items():
        cell = each["groups"][group][name]
        assert [cell["positives"], cell["negatives"]] == both
        assert (cell["auroc"] is not None) == (group in large)
    rows = np.isin(groups, large)
    reference = frame(given.take(rows), column, groups[rows])
    for group in large:
        for key, value in reference.by_group.loc[group].items():
            assert each["groups"][group][name][key]["value"] == pytest.approx(value, abs=1e-9)
    if len(large) > 1:
        for key, value in reference.difference(method="between_groups").items():
            assert each["gaps"][name][key]["value"] == pytest.approx(value, abs=1e-9)


def loop(
    given: Predictions, groups: np.ndarray, pair: List[str], resamples: Resamples
) -> Dict[str, np.ndarray]:
    """Repeat the rows of the drawn patients and score Mass, Nodule, their mean and a gap."""
    found: Dict[str, List[float]] = {}
    patients = given.patients
    for index in range(resamples.count):
        times = resamples.weights(index, int(patients.max()) + 1)[patients]
        rows = np.repeat(np.arange(len(given)), times)
        aurocs = np.full((2, 2), np.nan)
        for number, group in enumerate(pair):
            chosen = rows[groups[rows] == group]
            for column in (0, 1):
                known = chosen[given.labels[chosen, column] >= 0]
                truth, probs = given.labels[known, column], given.probabilities[known, column]
                if 0 < truth.sum() < len(truth):
                    aurocs[number, column] = roc_auc_score(truth, probs)
                rate = false_negative_rate(truth, probs, THRESHOLDS[NAMES[column]])
                found.setdefault(f"{group}/{NAMES[column]}/false_negative_rate", []).append(rate)
                found.setdefault(f"{group}/{NAMES[column]}/auroc", []).append(
                    aurocs[number, column]
                )
        means = aurocs.mean(axis=1)  # NaN if the group lacks a finding now
        for group, mean in zip(pair, means):
            found.setdefault(f"{group}/macro/auroc", []).append(mean)
        found.setdefault("gap", []).append(means[0] - means[1])
    return {key: np.array(values) for key, values in found.items()}


def limits(values: np.ndarray) -> np.ndarray:
    return np.quantile(values[~np.isnan(values)], [0.025, 0.975])


@pytest.mark.parametrize("attribute", ["sex", "view"])
def test_intervals_equal_a_loop_over_repeated_rows(attribute: str) -> None:
    given, resamples = random_predictions(), Resamples(60, seed=3)
    found = subgroups(given, THRESHOLDS, resamples)[attribute]
    assert found["macro_of"] == ["Mass", "Nodule"]
    gap = found["gaps"]["macro"]["auroc"]
    expected = loop(given, given.table[attribute].to_numpy(dtype=object), gap["of"], resamples)
    assert [gap["low"], gap["high"]] == pytest.approx(limits(expected.pop("gap")), abs=1e-12)
    for place, values in expected.items():
        group, name, key = place.split("/")
        cell = found["groups"][group][name][key]
        assert [cell["low"], cell["high"]] == pytest.approx(limits(values), abs=1e-12)


def test_mean_of_a_resample_that_lacks_a_finding_is_undefined() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(60), 4)
    labels = rng.integers(0, 2, (240, 3))
    sources = np.array(["a", "b"])[patients % 2]
    labels[sources == "a", 1] = patients[sources == "a"] <= 4  # three patients
    given = predictions(labels, patients=patients.tolist(), source=pd.Series(sources, dtype=object))
    resamples = Resamples(200, seed=1)
    found = subgroups(given, THRESHOLDS, resamples)["source"]
    gap = found["gaps"]["macro"]["auroc"]
    expected = loop(given, sources, gap["of"], resamples)
    assert np.isnan(expected["a/Nodule/auroc"]).any()
    assert found["macro_of"] == ["Mass", "Nodule"]
    assert [gap["low"], gap["high"]] == pytest.approx(limits(expected["gap"]), abs=1e-12)
    for group in ("a", "b"):
        cell = found["groups"][group]["macro"]["auroc"]
        mean = limits(expected[f"{group}/macro/auroc"])
        assert [cell["low"], cell["high"]] == pytest.approx(mean, abs=1e-12)


def test_file_of_predictions_gives_the_same(tmp_path: Path) -> None:
    given = random_predictions()
    given.write(tmp_path / "predictions.csv")
    read = read_predictions(tmp_path / "predictions.csv")
    assert subgroups(read, THRESHOLDS, Resamples(9)) == subgroups(given, THRESHOLDS, Resamples(9))


def test_sources_of_a_table_are_groups(tmp_path: Path) -> None:
    rows = [f"{'ns'[row % 2]}/{row}.png,p{row},{row // 2 % 2}" for row in range(48)]
    (tmp_path / "t.csv").write_text("\n".join(["path,who,Mass", *rows, ""]))
    columns: Any = {"source": {"column": "path", "pattern": "^([^/]+)/"}}
    columns.update(image="path", patient="who")
    section: Any = {"format": "table", "csv": "t.csv", "columns": columns, "labels": ["Mass"]}
    _, records = read_table_records(DataSection(root=str(tmp_path), **section))
    logits, labels = torch.randn(48, 1), torch.from_numpy(records.labels).float()
    outputs = EvalOutputs("test", 0, 0.0, {}, logits, labels, 0.0, ["Mass"])
    found = subgroups(predictions_of(records, outputs), {}, Resamples(20))
    assert list(found) == ["source"] and list(found["source"]["groups"]) == ["n", "s"]
    assert found["source"]["groups"]["s"]["images"] == 24
    assert found["source"]["gaps"]["Mass"]["auroc"]["low"] is not None


def two_groups(first: Sequence[int], second: Sequence[int]) -> Predictions:
    """Return groups a and b with these positives and negatives of Mass."""
    labels = np.repeat([1, 0, 1, 0], [*first, *second])[:, None]
    sources = np.repeat(["a", "b"], [sum(first), sum(second)])
    return predictions(labels, names=["Mass"], source=pd.Series(sources, dtype=object))


@pytest.mark.parametrize(
    ("first", "has_auroc", "has_rate"),
    [
        ((FEWEST, FEWEST), True, True),
        ((FEWEST - 1, FEWEST), False, False),
        ((FEWEST, FEWEST - 1), False, True),
    ],
)
def test_few_images_have_counts_and_no_number(
    first: Sequence[int], has_auroc: bool, has_rate: bool
) -> None:
    found = subgroups(two_groups(first, (20, 20)), THRESHOLDS, Resamples(10))["source"]
    cell = found["groups"]["a"]["Mass"]
    assert (cell["positives"], cell["negatives"]) == tuple(first)
    assert (cell["auroc"] is not None, cell["false_negative_rate"] is not None) == (
        has_auroc,
        has_rate,
    )
    gaps = found["gaps"].get("Mass", {})
    assert (gaps.get("auroc") is not None) == has_auroc
    assert (gaps.get("false_negative_rate") is not None) == has_rate
    assert ("macro" in found["gaps"]) == has_auroc


def test_a_small_group_leaves_the_means_of_the_others() -> None:
    labels = np.random.default_rng(0).integers(0, 2, (203, 3))
    labels[labels[:, 0] == 0, 1] = 0
    views = np.array(["AP", "PA"] * 100 + ["other"] * 3)
    found = subgroups(predictions(labels, view=pd.Series(views, dtype=object)), {}, NONE)["view"]
    assert found["groups"]["other"]["macro"] == {"auroc": None}
    assert found["macro_of"] == ["Mass", "Nodule"]
    for group in ("AP", "PA"):
        cells = found["groups"][group]
        each = [cells[name]["auroc"]["value"] for name in ("Mass", "Nodule")]
        assert cells["macro"]["auroc"]["value"] == pytest.approx(sum(each) / 2)
        assert cells["Mass"]["false_negative_rate"] is None, "no threshold is given"


def test_means_are_over_the_findings_that_every_group_has() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (200, 3))
    sexes = np.array(["F", "M"] * 100)
    labels[(sexes == "F") & (np.arange(200) > 15), 1] = 0  # 8 women or fewer have nodules
    found = subgroups(predictions(labels, sex=pd.Series(sexes, dtype=object)), {}, NONE)["sex"]
    assert found["macro_of"] == ["Mass"]
    men = found["groups"]["M"]
    assert men["Nodule"]["auroc"] is not None and men["macro"]["auroc"] == men["Mass"]["auroc"]
    assert "Nodule" not in found["gaps"]


def test_a_group_with_few_of_the_findings_leaves_the_others_comparable() -> None:
    names = [f"finding {column}" for column in range(5)]
    labels = np.random.default_rng(0).integers(0, 2, (260, 5))
    views = np.array(["AP", "PA"] * 100 + ["LAT"] * 60)
    few = views == "LAT"
    labels[few, 2:] = 0
    for ranked, macro_of in ((2, names), (3, names[:3])):
        labels[few, 2] = (np.arange(60) < 20) * (ranked == 3)
        given = predictions(labels, names=names, view=pd.Series(views, dtype=object))
        found = subgroups(given, {}, NONE)["view"]
        assert found["macro_of"] == macro_of
        assert found["groups"]["LAT"][names[0]]["auroc"] is not None
        # Two of five are less than half.
        assert (found["groups"]["LAT"]["macro"]["auroc"] is None) == (ranked == 2)
        assert found["groups"]["AP"]["macro"]["auroc"] is not None


def test_group_of_few_patients_has_no_interval() -> None:
    labels = np.tile([1, 0], 60)[:, None]
    sources = pd.Series(["a"] * 40 + ["b"] * 80, dtype=object)
    for count in (LEAST_PATIENTS - 1, LEAST_PATIENTS):
        # Each patient of a has positives and negatives.
        patients = [*(np.arange(40) // 2 % count), *range(100, 180)]
        given = predictions(labels, patients=patients, names=["Mass"], source=sources)
        found = subgroups(given, THRESHOLDS, Resamples(50))["source"]
        cells = found["groups"]["a"]
        for cell in (
            *(cells["Mass"][key] for key in ("auroc", "false_negative_rate")),
            *(cells["macro"]["auroc"], found["gaps"]["Mass"]["auroc"]),
            found["gaps"]["macro"]["auroc"],
        ):
            assert (cell["low"] is not None) == (count == LEAST_PATIENTS)


def test_one_group_has_no_gap() -> None:
    labels = np.random.default_rng(0).integers(0, 2, (60, 3))
    found = subgroups(predictions(labels, sex="F"), THRESHOLDS, Resamples(20))["sex"]
    assert list(found["groups"]) == ["F"] and found["gaps"] == {}
    assert found["groups"]["F"]["macro"]["auroc"]["low"] is not None


def test_what_is_unknown_is_no_group() -> None:
    labels = np.random.default_rng(0).integers(0, 2, (40, 3))
    unknown = predictions(labels, sex="", age=np.nan, follow_up=np.nan, view="")
    assert subgroups(unknown, {}, NONE) == {}
    assert subgroups(predictions(labels), {}, NONE) == {}
    found = subgroups(predictions(labels, sex=["F"] + [""] * 39), {}, NONE)["sex"]
    assert (found["unknown"], found["macro_of"], found["gaps"]) == (39, [], {})
    assert found["groups"]["F"]["images"] == 1


def test_ages_and_visits_have_their_borders() -> None:
    ages = [0, 17.99, 18, 39, 40, 59.5, 60, 79, 80, 119, np.nan, -1, math.inf]
    visits = [0, 0, 0, 1, 2, 183, np.nan, -1, *[0] * 5]
    given = predictions(np.zeros((13, 3)), age=ages, follow_up=np.array(visits, float))
    found = subgroups(given, {}, NONE)
    images = {
        attribute: {group: cells["images"] for group, cells in each["groups"].items()}
        for attribute, each in found.items()
    }
    assert list(images["age"].items()) == [
        ("0-17", 2),
        ("18-39", 2),
        ("40-59", 2),
        ("60-79", 2),
        ("80+", 2),
    ]
    assert images["visit"] == {"first": 8, "follow_up": 3}
    assert (found["age"]["unknown"], found["visit"]["unknown"]) == (3, 2)


def test_group_that_many_resamples_lack_has_no_interval() -> None:
    labels = np.tile([1, 0], 60)[:, None]
    patients = [0] * 40 + list(range(1, 81))
    sources = pd.Series(["a"] * 40 + ["b"] * 80, dtype=object)
    given = predictions(labels, patients=patients, names=["Mass"], source=sources)
    found = subgroups(given, THRESHOLDS, Resamples(50))["source"]
    for key in ("auroc", "false_negative_rate"):
        alone, others = (found["groups"][group]["Mass"][key] for group in "ab")
        assert (alone["low"], alone["high"]) == (None, None) and others["low"] < others["high"]
        assert found["gaps"]["Mass"][key]["low"] is None
    assert found["groups"]["a"]["patients"] == 1
    macros = [found["groups"][group]["macro"]["auroc"]["low"] for group in "ab"]
    assert macros[0] is None and macros[1] is not None
    assert found["gaps"]["macro"]["auroc"]["low"] is None


def test_one_patient_has_no_interval() -> None:
    labels = np.tile([1, 0], 20)[:, None]
    given = predictions(labels, patients=[7] * 40, names=["Mass"], view="PA")
    cell = subgroups(given, THRESHOLDS, Resamples(20))["view"]["groups"]["PA"]["Mass"]
    assert cell["auroc"]["value"] > 0 and cell["auroc"]["low"] is None


def test_equal_groups_have_a_gap_of_zero_between_two() -> None:
    labels, probs = np.tile([1, 0], 40)[:, None], np.tile([0.8, 0.3], 40)[:, None]
    sexes = pd.Series(["F"] * 40 + ["M"] * 40, dtype=object)
    given = predictions(labels, probs, names=["Mass"], sex=sexes)
    gap = subgroups(given, THRESHOLDS, Resamples(30))["sex"]["gaps"]["Mass"]["auroc"]
    assert gap == {"value": 0.0, "low": None, "high": None, "of": ["F", "M"]}


def test_a_positive_has_the_threshold_or_more() -> None:
    labels, probs = np.ones((20, 1)), np.repeat([0.5, 0.49], 10)[:, None]
    given = predictions(labels, probs, names=["Mass"], sex="F")
    cell = subgroups(given, {"Mass": 0.5}, NONE)["sex"]["groups"]["F"]["Mass"]
    assert cell["false_negative_rate"]["value"] == 0.5
    assert cell["auroc"] is None


def test_the_largest_of_many_groups_are_scored() -> None:
    sources = [f"s{row}" for row in range(MOST_GROUPS + 5)] * 2 + ["s54"] * 3 + [""]
    labels = np.zeros((len(sources), 1))
    given = predictions(labels, names=["Mass"], source=pd.Series(sources, dtype=object))
    found = subgroups(given, {}, NONE)["source"]
    assert len(found["groups"]) == MOST_GROUPS
    assert found["groups"]["s54"]["images"] == 5
    assert (found["left_out"], found["unknown"]) == (10, 1)
