"""Differences of models on the same images: matching, intervals, p-values, the figure."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from MLstatkit import Delong_test
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_vit.data.records import UNKNOWN
from cxr_vit.errors import DataError
from cxr_vit.evaluation.bootstrap import LEAST_PATIENTS, Resamples
from cxr_vit.evaluation.comparison import (
    BETTER,
    MEAN,
    NOISE,
    TOO_FEW,
    WORSE,
    Model,
    compare,
    comparison_figure,
    comparison_rows,
    holm,
    pair,
    read_models,
    two_sided_p,
)
from cxr_vit.evaluation.predictions import Predictions

NAMES = ("Mass", "Hernia", "Edema")


def make_truth(images=300, *, seed=0, labels=3):
    return (np.random.default_rng(seed).random((images, labels)) < 0.25).astype(np.int8)


def make_predictions(truth, strength=1.0, *, seed=0, names=NAMES, images_per_patient=1):
    """Random scores that tell positives apart by `strength` standard deviations."""
    noise = np.random.default_rng([7, seed]).normal(size=truth.shape)
    logits = strength * truth + noise
    rows = np.arange(len(truth))
    table = pd.DataFrame(
        {
            "image": [f"{row:05}.png" for row in rows],
            "patient": [str(row // images_per_patient) for row in rows],
            "split": "test",
        }
    )
    probs = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return Predictions(names, table, truth, probs, np.full((len(truth), 4), np.nan, np.float32))


def paired(*predictions):
    return pair(
        [Model(letter, Path(f"{letter}.csv"), each) for letter, each in zip("ABCD", predictions)]
    )


def compared(*predictions, resamples=200):
    return compare(paired(*predictions), Resamples(resamples))


def auroc(found, name="Mass", model=0):
    return found["comparisons"][model]["labels"][name]["auroc"]


# The numbers


@pytest.mark.parametrize("images_per_patient", [1, 3])
def test_differences_are_those_of_repeated_rows(images_per_patient):
    truth = make_truth(150)
    first, second = (
        make_predictions(truth, strength, seed=seed, images_per_patient=images_per_patient)
        for seed, strength in enumerate((1.0, 1.4))
    )
    truth[::7, 1] = UNKNOWN
    count, resamples = 150 // images_per_patient, Resamples(120, seed=3)
    found = compare(paired(first, second), resamples)["comparisons"][0]
    scorers = {"auroc": roc_auc_score, "average_precision": average_precision_score}
    patients = first.patients
    for score, scorer in scorers.items():
        differences = []
        for index in range(120):
            weights = resamples.weights(index, count)
            rows = np.repeat(np.arange(150), weights[patients])
            rows = rows[truth[rows, 1] != UNKNOWN]
            both = [
                scorer(truth[rows, 1], each.probabilities[rows, 1].astype(float))
                for each in (first, second)
            ]
            differences.append(both[1] - both[0])
        entry = found["labels"]["Hernia"][score]
        low, high = np.quantile(differences, [0.025, 0.975])
        assert entry["difference"]["low"] == pytest.approx(low, abs=1e-12)
        assert entry["difference"]["high"] == pytest.approx(high, abs=1e-12)
        assert entry["p"] == two_sided_p(np.array(differences).round(12))
        known = truth[:, 1] != UNKNOWN
        for key, each in (("baseline", first), ("model", second)):
            expected = scorer(truth[known, 1], each.probabilities[known, 1].astype(float))
            assert entry[key] == pytest.approx(expected, abs=1e-12)


def test_the_macro_is_the_mean_of_the_findings():
    truth = make_truth(labels=4)
    names = (*NAMES, "No Finding")
    models = [make_predictions(truth, 1, seed=seed, names=names) for seed in (0, 1)]
    found = compared(*models)["comparisons"][0]
    for score in ("auroc", "average_precision"):
        each = [found["labels"][name][score]["difference"]["value"] for name in NAMES]
        assert found["macro"][score]["difference"]["value"] == pytest.approx(np.mean(each))
        assert found["macro"][score]["p"] == found["macro"][score]["p_holm"]


@pytest.mark.parametrize("strength", [0.9, 1.0, 1.15, 1.3])
def test_p_agrees_with_delongs_where_each_patient_has_one_image(strength):
    truth = make_truth(800, seed=5)
    models = make_predictions(truth, 1.0, seed=1), make_predictions(truth, strength, seed=2)
    found = compared(*models, resamples=2000)
    for column, name in enumerate(NAMES):
        scores = (each.probabilities[:, column].astype(float) for each in models)
        z, p, *_ = Delong_test(truth[:, column], *scores)
        entry = auroc(found, name)
        # Three standard errors of a share of the resamples, and what a normal distribution is off.
        assert entry["p"] == pytest.approx(p, abs=6 * math.sqrt(p / 2 * (1 - p / 2) / 2000) + 0.01)
        difference = entry["difference"]
        assert np.sign(z) == np.sign(difference["value"])
        # The width of the interval is that of DeLong's standard error.
        error = difference["value"] / z
        assert difference["high"] - difference["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_equal_predictions_do_not_differ():
    found = compared(make_predictions(make_truth()), make_predictions(make_truth()))
    for _, entry in [("", found["comparisons"][0]["macro"]), *labels_of(found)]:
        for score in ("auroc", "average_precision"):
            assert entry[score]["difference"] == {"value": 0.0, "low": None, "high": None}
            assert (entry[score]["p"], entry[score]["p_holm"]) == (1.0, 1.0)
            assert entry[score]["verdict"] == NOISE


def labels_of(found):
    return found["comparisons"][0]["labels"].items()


def test_verdict_says_the_direction():
    truth = make_truth()
    weak, strong = make_predictions(truth, 0.3, seed=0), make_predictions(truth, 2.5, seed=1)
    assert {entry["auroc"]["verdict"] for _, entry in labels_of(compared(weak, strong))} == {BETTER}
    assert {entry["auroc"]["verdict"] for _, entry in labels_of(compared(strong, weak))} == {WORSE}


def test_every_model_is_compared_with_the_first():
    truth = make_truth()
    first, second, third = (make_predictions(truth, 1 + i / 5, seed=i) for i in range(3))
    both = compared(first, second, third)
    assert [each["model"] for each in both["comparisons"]] == ["B", "C"]
    alone = compared(first, third)["comparisons"][0]
    assert both["comparisons"][1]["labels"] == alone["labels"]
    assert both["comparisons"][1]["macro"] == alone["macro"]


def test_models_that_do_not_differ_are_rarely_called_different():
    rejected = []
    for seed in range(100):
        truth = np.repeat(make_truth(80, seed=seed, labels=1), 3, axis=0)
        of_patient = np.random.default_rng([1, seed]).normal(size=(2, 80, 1)).repeat(3, axis=1)
        models = []
        for index in (0, 1):
            each = make_predictions(
                truth, 1.0, seed=2 * seed + index, names=("Mass",), images_per_patient=3
            )
            logits = np.log(each.probabilities / (1 - each.probabilities)) + 2 * of_patient[index]
            probs = (1 / (1 + np.exp(-logits))).astype(np.float32)
            models.append(Predictions(each.names, each.table, truth, probs, each.relabels))
        rejected.append(auroc(compared(*models, resamples=200))["p"] < 0.05)
    # 5 % are expected; 14 % are four standard errors more.
    assert np.mean(rejected) < 0.14


def test_undefined_label_has_no_difference():
    truth = make_truth()
    truth[:, 1] = 0
    found = compared(make_predictions(truth, seed=0), make_predictions(truth, seed=1))
    entry = found["comparisons"][0]["labels"]["Hernia"]
    assert (entry["positives"], entry["auroc"], entry["average_precision"]) == (0, None, None)
    others = [auroc(found, name) for name in ("Mass", "Edema")]
    # Holm's method counts the two that are tested.
    assert [each["p_holm"] for each in others] == holm([each["p"] for each in others])
    assert [row["verdict"] for row in comparison_rows(found)].count("undefined") == 2
    json.dumps(found, allow_nan=False)


def test_nothing_is_defined_without_positives():
    truth = np.zeros((30, 3), np.int8)
    found = compared(make_predictions(truth, seed=0), make_predictions(truth, seed=1))
    assert found["comparisons"][0]["macro"] == {"auroc": None, "average_precision": None}
    json.dumps(found, allow_nan=False)
    comparison_figure(found, "research")


def test_few_positive_patients_give_no_interval():
    truth = make_truth()
    truth[:, 1] = 0
    truth[: LEAST_PATIENTS - 1, 1] = 1
    models = [make_predictions(truth, seed=seed) for seed in (0, 1)]
    entry = auroc(compared(*models), "Hernia")
    assert entry["difference"]["value"] is not None
    assert (entry["difference"]["low"], entry["p"], entry["p_holm"]) == (None, None, None)
    assert entry["verdict"] == TOO_FEW
    truth[LEAST_PATIENTS - 1, 1] = 1
    assert auroc(compared(*models), "Hernia")["p"] is not None


def test_the_macro_is_tested_on_the_resamples_that_have_all_its_findings():
    truth = make_truth()
    truth[:, 1] = 0
    truth[5, 1] = 1
    models = [make_predictions(truth, seed=seed) for seed in (0, 1)]
    # In one model the rare finding's only positive is last, in the other first.
    for model, prob in zip(models, (0.0, 1.0)):
        model.probabilities[5, 1] = prob
    macro = compared(*models)["comparisons"][0]["macro"]["auroc"]
    assert macro["difference"]["low"] > 0.2 and macro["verdict"] == BETTER


def test_a_difference_without_limits_has_a_direction():
    truth = make_truth(labels=1)
    models = [make_predictions(truth, names=("Mass",)) for _ in range(2)]
    models[0].probabilities[:], models[1].probabilities[:] = 1 - truth, truth
    for given, verdict in ((models, BETTER), (models[::-1], WORSE)):
        entry = auroc(compared(*given))
        assert (entry["difference"]["low"], entry["verdict"]) == (None, verdict)


def test_one_patient_gives_no_interval():
    truth = make_truth(40)
    models = (make_predictions(truth, seed=seed, images_per_patient=40) for seed in (0, 1))
    found = compared(*models)
    macro = found["comparisons"][0]["macro"]["auroc"]
    assert (macro["difference"]["low"], macro["p"], macro["verdict"]) == (None, None, TOO_FEW)
    assert found["intervals"]["patients"] == 1


def test_too_few_resamples_for_the_correction_are_reported():
    truth = make_truth()
    models = make_predictions(truth, 0.3, seed=0), make_predictions(truth, 2.5, seed=1)
    few, enough = compared(*models, resamples=119), compared(*models, resamples=120)
    assert "at least 120 are needed" in few["warnings"][-1]
    assert auroc(few)["verdict"] == NOISE
    assert enough["warnings"] == []
    assert auroc(enough)["verdict"] == BETTER


# p-values


def test_p_is_twice_the_smaller_share():
    differences = np.concatenate([np.full(970, 0.1), np.full(29, -0.1)])
    assert two_sided_p(differences) == pytest.approx(2 * 30 / 1000)
    assert two_sided_p(-differences) == pytest.approx(2 * 30 / 1000)
    assert two_sided_p(np.ones(999)) == pytest.approx(2 / 1000)  # never 0
    assert two_sided_p(np.zeros(999)) == 1.0


def test_holm_of_a_hand_worked_example():
    # In order: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_rejects_what_the_closed_test_of_bonferroni_rejects():
    values = np.random.default_rng(0).random(5) ** 3 / 4
    for index, adjusted in enumerate(holm(values)):
        # A hypothesis is rejected if each set with it is: the largest p of those sets.
        sets = (
            [index, *others]
            for size in range(5)
            for others in itertools.combinations(set(range(5)) - {index}, size)
        )
        assert adjusted == pytest.approx(max(min(1, len(s) * values[s].min()) for s in sets))


# Matching


def test_rows_are_matched_by_image():
    truth = make_truth()
    first, second = make_predictions(truth, seed=0), make_predictions(truth, 1.5, seed=1)
    shuffled = second.take(np.random.default_rng(0).permutation(len(truth)))
    columns = [2, 0, 1]
    reordered = Predictions(
        tuple(NAMES[column] for column in columns),
        shuffled.table,
        shuffled.labels[:, columns],
        shuffled.probabilities[:, columns],
        shuffled.relabels,
    )
    assert compared(first, reordered) == compared(first, second)


def test_images_that_one_lacks_are_left_out_and_counted():
    truth = make_truth()
    first, second = make_predictions(truth, seed=0), make_predictions(truth, 1.5, seed=1)
    found = compared(first.take(np.arange(20, 300)), second.take(np.arange(250)))
    kept = np.arange(20, 250)
    expected = compared(first.take(kept), second.take(kept))
    assert found["comparisons"] == expected["comparisons"]
    assert [model["images"] for model in found["models"]] == [280, 250]
    assert found["images"] == 230
    assert found["warnings"] == [
        "50 of 280 images of A are left out: not all files have them",
        "20 of 250 images of B are left out: not all files have them",
    ]


def test_labels_that_differ_are_unknown():
    truth = make_truth()
    other = truth.copy()
    other[:4, 0] = 1 - other[:4, 0]
    other[3:5, 2] = UNKNOWN
    first, second = make_predictions(truth, seed=0), make_predictions(truth, 1.5, seed=1)
    changed = Predictions(NAMES, second.table, other, second.probabilities, second.relabels)
    pairing = paired(first, changed)
    assert pairing.notes == [
        "labels differ between the files for 5 of 300 images (Mass of 4, Edema of 2): these labels"
        " are left out"
    ]
    expected = truth.copy()
    expected[:4, 0] = expected[3:5, 2] = UNKNOWN
    for model in pairing.models:
        assert np.array_equal(model.predictions.labels, expected)
    entry = compare(pairing, Resamples(100))["comparisons"][0]["labels"]["Mass"]
    assert entry["positives"] + entry["negatives"] == 296


def test_labels_that_one_lacks_are_left_out():
    truth = make_truth()
    second = make_predictions(truth[:, :2], names=("Hernia", "Nodule"))
    pairing = paired(make_predictions(truth), second)
    assert pairing.models[0].predictions.names == ("Hernia",)
    assert "labels that not all files have are left out: Mass, Edema, Nodule" in pairing.notes


def test_other_splits_and_patients_are_said():
    truth = make_truth()
    first, second = make_predictions(truth, seed=0), make_predictions(truth, seed=1)
    second.table.loc[:2, "split"] = "val"
    second.table.loc[7, "patient"] = "x"
    assert paired(first, second).notes == [
        "the split of 3 of 300 images is another one in B than in A, such as 'val' and 'test' of"
        " '00000.png'; A's counts",
        "the patient of 1 of 300 images is another one in B than in A, such as 'x' and '7' of"
        " '00007.png'; A's counts",
    ]


def test_nothing_in_common_is_refused():
    first = make_predictions(make_truth())
    other_names = make_predictions(make_truth(), names=("a", "b", "c"))
    with pytest.raises(
        DataError, match=r"no label is in all of the files .A: Mass, Hernia, Edema;"
    ):
        paired(first, other_names)
    other_images = make_predictions(make_truth())
    other_images.table["image"] = [f"x{image}" for image in other_images.table["image"]]
    with pytest.raises(
        DataError, match=r"no image of A.csv .* B.csv has 300, such as 'x00000.png'"
    ):
        paired(first, other_images)


def test_image_twice_in_a_file_is_refused(tmp_path):
    predictions = make_predictions(make_truth(20))
    predictions.table.loc[3, "image"] = "00002.png"
    predictions.write(tmp_path / "predictions.csv")
    with pytest.raises(DataError, match=r"there before in 1 of 20 rows, .*'00002.png'"):
        read_models([tmp_path / "predictions.csv"] * 2)


# The figure


def test_figure_has_a_marker_per_difference():
    truth = make_truth()
    truth[:, 1] = 0
    strengths = (0.3, 2.5, 0.35)
    models = [make_predictions(truth, strength, seed=i) for i, strength in enumerate(strengths)]
    found = compared(*models)
    figure = comparison_figure(found, "research only")
    axis = figure.axes[0]
    texts = [text.get_text() for text in axis.get_yticklabels()]
    assert texts == [
        MEAN,
        *(f"{name} ({column.sum()})" for name, column in zip(NAMES, truth.T)),
    ]
    markers = [line for line in axis.lines if line.get_marker() != "None"]
    assert len(markers) == 2 * 3  # two models, the mean and two defined labels
    values = {round(float(line.get_xdata()[0]), 12) for line in markers}
    for comparison in found["comparisons"]:
        assert round(comparison["labels"]["Mass"]["auroc"]["difference"]["value"], 12) in values
    filled = [line for line in markers if line.get_markerfacecolor() != "white"]
    verdicts = [
        entry["auroc"]["verdict"]
        for each in found["comparisons"]
        for entry in [each["macro"], *each["labels"].values()]
        if entry["auroc"] is not None
    ]
    assert len(filled) == sum(verdict in (BETTER, WORSE) for verdict in verdicts)
    assert figure.legends[0].get_title().get_text() == "research only"


def test_label_with_the_name_of_the_mean_has_a_row_of_its_own():
    truth = make_truth(60)
    names = (MEAN, *NAMES[1:])
    models = [make_predictions(truth, 0.3 + 2 * seed, seed=seed, names=names) for seed in (0, 1)]
    found = compared(*models, resamples=100)
    markers = comparison_figure(found, "research").axes[0].lines
    first = next(line for line in markers if line.get_marker() != "None")
    macro = found["comparisons"][0]["macro"]["auroc"]["difference"]["value"]
    assert float(first.get_xdata()[0]) == macro


def test_figure_of_many_labels_shows_the_most_frequent(tmp_path):
    truth = make_truth(60, labels=45)
    truth[:, 3] = 0
    truth[0, 3] = 1
    names = tuple(f"$label_{i}^$" for i in range(45))  # no formula
    found = compared(
        *(make_predictions(truth, seed=seed, names=names) for seed in (0, 1)), resamples=100
    )
    figure = comparison_figure(found, "research")
    figure.savefig(tmp_path / "a.png")
    assert len(figure.axes[0].get_yticklabels()) == 41
    assert any("the 40 most frequent of 45 labels" in text.get_text() for text in figure.texts)
    assert not any("label_3^" in text.get_text() for text in figure.axes[0].get_yticklabels())
    assert math.isclose(figure.get_figheight(), 1.5 + 41 * 0.27)
