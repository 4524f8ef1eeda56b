"""The scores of a report against scikit-learn, a slow bootstrap, and what must hold."""

from __future__ import annotations

import json
from typing import Any, Dict

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from cxr_vit.data.labels import FINDINGS
from cxr_vit.evaluation.bootstrap import LEAST_PATIENTS, Resamples, limits, replicate
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.evaluation.scores import score
from cxr_vit.evaluation.statistics import errors, joined, ranking, ratios
from scored_rows import make_predictions, random_predictions, real_predictions

NONE = Resamples(0)
EXACT = {"abs": 1e-9, "rel": 0}


def values(found: Dict[str, Any]) -> Dict[str, Any]:
    kinds = ("auroc", "average_precision", "brier", "log_loss")
    return {kind: found[kind] and found[kind]["value"] for kind in kinds}


def by_scikit_learn(truth: np.ndarray, probs: np.ndarray) -> Dict[str, float]:
    probs = probs.astype(np.float64)
    near = np.finfo(np.float32).epsneg
    return {
        "auroc": roc_auc_score(truth, probs),
        "average_precision": average_precision_score(truth, probs),
        "brier": brier_score_loss(truth, probs),
        "log_loss": log_loss(truth, np.clip(probs, near, 1 - near), labels=[0, 1]),
    }


def check(predictions: Predictions) -> None:
    """Compare every score with scikit-learn's, which gets the known rows alone."""
    found = score(predictions, NONE)
    truth, probs = predictions.labels, predictions.probabilities
    known = truth != -1
    each = [by_scikit_learn(t[k], p[k]) for t, p, k in zip(truth.T, probs.T, known.T)]
    for name, expected in zip(predictions.names, each):
        assert values(found["findings"][name]) == pytest.approx(expected, **EXACT)
    positives = (truth == 1).sum(axis=0)
    for kind in each[0]:
        of_kind = [one[kind] for one in each]
        means = {name: found["means"][name][kind]["value"] for name in ("macro", "weighted")}
        expected = {"macro": np.mean(of_kind), "weighted": np.average(of_kind, weights=positives)}
        assert means == pytest.approx(expected, **EXACT)
    expected = by_scikit_learn(truth[known], probs[known])
    assert values(found["means"]["micro"]) == pytest.approx(expected, **EXACT)


def test_scores_of_the_real_labels_are_those_of_scikit_learn() -> None:
    check(real_predictions())


@pytest.mark.parametrize("seed", range(5))
def test_unknown_labels_are_left_out(seed: int) -> None:
    check(random_predictions(200, 4, seed=seed, unknown=0.3))


def test_averages_of_scikit_learn_are_ours() -> None:
    predictions = random_predictions(300, 5, seed=0)
    means = score(predictions, NONE)["means"]
    given = predictions.labels, predictions.probabilities.astype(np.float64)
    for name in ("macro", "weighted", "micro"):
        assert means[name]["auroc"]["value"] == pytest.approx(
            roc_auc_score(*given, average=name), **EXACT
        )
        assert means[name]["average_precision"]["value"] == pytest.approx(
            average_precision_score(*given, average=name), **EXACT
        )


# The bootstrap


def ranked(predictions: Predictions) -> Any:
    given = predictions.probabilities, predictions.labels, predictions.patients
    return ranking(*given, predictions.names, predictions.findings)


def repeated(predictions: Predictions, weights: np.ndarray) -> Predictions:
    """Return the rows of each patient as often as it was drawn."""
    return predictions.take(np.repeat(np.arange(len(predictions)), weights[predictions.patients]))


def check_bootstrap(predictions: Predictions, count: int, *, seed: int) -> None:
    """Score repeated rows by the statistic without weights, and by scikit-learn."""
    resamples, patients = Resamples(count, seed), int(predictions.patients.max()) + 1
    fast = replicate(ranked(predictions), patients, resamples)
    others = errors(
        *(predictions.probabilities, predictions.labels, predictions.patients),
        *(predictions.names, predictions.findings),
    )
    fast_errors = replicate(others, patients, resamples)
    for index in range(count):
        drawn = repeated(predictions, resamples.weights(index, patients))
        statistic = ranked(drawn)
        once = statistic.of(np.ones((1, int(drawn.patients.max()) + 1), np.int64))[0]
        assert np.array_equal(once, fast[index], equal_nan=True), "to the last digit"
        found = score(drawn, NONE)
        for column, name in enumerate(others.names):
            kind, label = name.split("/")
            where = found["findings"].get(label) or found["means"][label]
            assert fast_errors[index, column] == pytest.approx(where[kind]["value"], **EXACT)
        for column, label in enumerate(drawn.names):
            known = drawn.labels[:, column] != -1
            truth, probs = drawn.labels[known, column], drawn.probabilities[known, column]
            if len(set(truth)) == 2:
                expected = roc_auc_score(truth, probs), average_precision_score(truth, probs)
                places = [statistic.names.index(f"{kind}/{label}") for kind in KINDS]
                assert fast[index, places] == pytest.approx(expected, **EXACT)


KINDS = ("auroc", "average_precision")


def test_resample_is_the_repeated_rows_of_its_patients() -> None:
    check_bootstrap(random_predictions(150, 3, seed=1, unknown=0.2), 25, seed=7)


def test_resample_of_the_real_labels_is_the_repeated_rows() -> None:
    check_bootstrap(real_predictions(), 3, seed=0)


def test_limits_are_the_percentiles_of_a_slow_loop() -> None:
    predictions = random_predictions(120, 2, seed=3)
    patients = int(predictions.patients.max()) + 1
    loop = []
    for index in range(40):
        generator = np.random.default_rng([5, index])
        drawn = np.bincount(generator.integers(0, patients, patients), minlength=patients)
        rows = repeated(predictions, drawn)
        loop.append(score(rows, NONE)["findings"][FINDINGS[0]]["auroc"]["value"])
    auroc = score(predictions, Resamples(40, 5))["findings"][FINDINGS[0]]["auroc"]
    assert [auroc["low"], auroc["high"]] == np.quantile(loop, [0.025, 0.975]).tolist()


def test_resamples_do_not_depend_on_threads_or_on_how_many_there_are(monkeypatch: Any) -> None:
    predictions = random_predictions(100, 2, seed=4)
    statistic, patients = ranked(predictions), int(predictions.patients.max()) + 1
    whole = replicate(statistic, patients, Resamples(30))
    monkeypatch.setattr("cxr_vit.evaluation.bootstrap._threads", lambda: 7)
    done = []
    assert np.array_equal(whole[:13], replicate(statistic, patients, Resamples(13), done.append))
    assert sum(done) == 13, "progress"


def test_large_weights_are_counted_exactly() -> None:
    predictions = random_predictions(40, 1, seed=0)
    statistic = ranked(predictions)
    ones = np.ones((1, 40), np.int64)
    assert np.array_equal(statistic.of(ones), statistic.of(ones * 10**8))


def test_joined_and_ratios_are_resample_by_resample() -> None:
    predictions = random_predictions(60, 2, seed=5)
    statistic = ranked(predictions)
    weights = np.random.default_rng(0).integers(0, 3, (4, 60))
    both = joined({"a": statistic, "b": statistic})
    assert both.names[0].startswith("a/") and both.names[-1].startswith("b/")
    assert np.array_equal(both.of(weights), np.tile(statistic.of(weights), 2))
    share = ratios(np.ones((60, 1)), np.full((60, 1), 2.0), predictions.patients, ["half"])
    assert share.of(weights) == pytest.approx(0.5)


def test_macro_alone_is_the_same_macro() -> None:
    predictions = random_predictions(80, 3, seed=6)
    given = predictions.probabilities, predictions.labels, predictions.patients
    macro = ranking(*given, predictions.names, predictions.findings, means=("macro",))
    weights = np.random.default_rng(0).integers(0, 3, (4, 80))
    one, all_of_them = (dict(zip(s.names, s.of(weights).T)) for s in (macro, ranked(predictions)))
    assert "auroc/micro" not in one
    assert all(np.array_equal(one[name], all_of_them[name]) for name in one)


def test_value_that_resamples_leave_undefined_has_no_limits() -> None:
    values = np.linspace(0.0, 1.0, 50)
    assert limits(np.append(values, [np.nan] * 51)) == (None, None)
    assert limits(np.append(values, [np.nan] * 50)) == pytest.approx((0.025, 0.975))
    assert limits(np.empty(0)) == (None, None)


def test_limits_that_are_one_value_are_none() -> None:
    assert limits(np.full(100, 0.5)) == (None, None)
    assert limits(np.tile([0.1, np.nextafter(0.1, 1)], 50)) == (None, None), "rounding of sums"


def test_mean_of_a_resample_that_lacks_a_finding_is_undefined() -> None:
    given = random_predictions(90, 3, seed=9)
    given.labels[:, 2] = given.patients == 4
    patients, resamples = int(given.patients.max()) + 1, Resamples(80)
    drawn = [resamples.weights(index, patients) for index in range(resamples.count)]
    lacks = np.array([each[4] == 0 for each in drawn])
    assert 0.2 < lacks.mean() < 0.5
    fast = dict(zip(ranked(given).names, replicate(ranked(given), patients, resamples).T))
    for kind in KINDS:
        each = np.stack([fast[f"{kind}/{name}"] for name in given.names])
        assert fast[f"{kind}/macro"] == pytest.approx(each.mean(axis=0), nan_ok=True, **EXACT)
        for mean in ("macro", "weighted"):
            assert np.array_equal(np.isnan(fast[f"{kind}/{mean}"]), lacks)
        found = score(given, resamples)
        macro, rare = found["means"]["macro"][kind], found["findings"][given.names[2]][kind]
        expected = np.quantile(fast[f"{kind}/macro"][~lacks], [0.025, 0.975]).tolist()
        assert [macro["low"], macro["high"]] == expected, "of the resamples that have it"
        assert rare["value"] is not None and rare["low"] is None


def test_errors_of_a_resample_without_a_known_label_are_in_no_mean() -> None:
    given = random_predictions(90, 2, seed=9)
    given.labels[given.patients != 4, 1] = -1
    patients = int(given.patients.max()) + 1
    statistic = errors(
        *(given.probabilities, given.labels, given.patients), *(given.names, given.findings)
    )
    weights = np.ones((2, patients), np.int64)
    weights[1, 4] = 0
    found = dict(zip(statistic.names, statistic.of(weights).T))
    for kind in ("brier", "log_loss"):
        for mean in ("macro", "weighted"):
            assert np.isnan(found[f"{kind}/{mean}"]).tolist() == [False, True]


# What must hold


def only(predictions: Predictions, count: int = 50) -> Dict[str, Any]:
    """Return the scores of the one finding."""
    found: Dict[str, Any] = score(predictions, Resamples(count))["findings"][FINDINGS[0]]
    return found


TRUTH = np.tile([[0], [1]], (30, 1))
SPREAD = np.linspace(0.1, 0.4, 60)[:, None]


def test_perfect_scores() -> None:
    found = only(make_predictions(TRUTH, TRUTH))
    assert found["auroc"] == {"value": 1.0, "low": None, "high": None}
    assert found["average_precision"]["value"] == 1.0
    assert found["brier"]["value"] == 0.0
    assert 0 <= found["log_loss"]["value"] < 1e-6, "finite"
    assert found["delong"] is None, "without an interval to compare it with"


def test_reversed_scores() -> None:
    found = only(make_predictions(TRUTH, 1 - TRUTH))
    assert (found["auroc"]["value"], found["brier"]["value"]) == (0.0, 1.0)
    assert found["log_loss"]["value"] == pytest.approx(24 * np.log(2))


def test_constant_scores() -> None:
    found = only(make_predictions(TRUTH, np.full(TRUTH.shape, 0.5)))
    assert found["auroc"] == {"value": 0.5, "low": None, "high": None}
    assert found["average_precision"]["value"] == found["prevalence"] == 0.5
    assert found["brier"]["value"] == 0.25
    assert found["log_loss"] == {"value": pytest.approx(np.log(2)), "low": None, "high": None}


def test_order_of_tied_images_does_not_matter() -> None:
    probs = np.repeat([0.2, 0.4, 0.6], 20)[:, None]
    found = only(make_predictions(TRUTH, probs))
    swapped = only(make_predictions(1 - TRUTH[::-1], probs))
    assert found["auroc"]["value"] == swapped["auroc"]["value"] == 0.5


def test_one_patient_has_no_interval() -> None:
    found = score(make_predictions(TRUTH, SPREAD, ["one"] * 60), Resamples(50))
    assert found["intervals"]["patients"] == 1
    auroc = found["findings"][FINDINGS[0]]["auroc"]
    assert auroc["value"] is not None and auroc["low"] is auroc["high"] is None
    assert found["means"]["macro"]["brier"]["low"] is None


@pytest.mark.parametrize("rare", [0, 1])
@pytest.mark.parametrize("patients", [LEAST_PATIENTS - 1, LEAST_PATIENTS])
def test_few_patients_of_a_class_have_no_interval(rare: int, patients: int) -> None:
    truth = np.full((60, 1), 1 - rare)
    truth[: 2 * patients] = rare
    # Each patient of the rare class has two images.
    whose = [*(np.arange(2 * patients) // 2), *range(100, 160 - 2 * patients)]
    probs = np.random.default_rng(0).permutation(SPREAD)
    found = only(make_predictions(truth, probs, whose))
    for kind in ("auroc", "average_precision", "brier", "log_loss"):
        assert found[kind]["value"] is not None
        assert (found[kind]["low"] is not None) == (patients == LEAST_PATIENTS)
    assert (found["delong"] is not None) == (patients == LEAST_PATIENTS)


@pytest.mark.parametrize("present", [0, 1])
def test_finding_of_one_class_is_undefined_and_in_no_mean(present: int) -> None:
    labels = np.concatenate([TRUTH, np.full(TRUTH.shape, present)], axis=1)
    probs = np.tile(SPREAD, 2)
    found = score(make_predictions(labels, probs), Resamples(50))
    one_class, other = (found["findings"][name] for name in FINDINGS[1::-1])
    assert one_class["auroc"] is one_class["average_precision"] is one_class["delong"] is None
    assert one_class["brier"]["value"] is not None, "a mean over images"
    assert found["means"]["macro"]["auroc"]["value"] == other["auroc"]["value"]
    assert found["means"]["weighted"]["auroc"]["value"] == other["auroc"]["value"]


def test_nothing_known_is_nothing_scored() -> None:
    found = score(make_predictions(np.full((20, 2), -1), np.full((20, 2), 0.5)), Resamples(50))
    for scores in (*found["findings"].values(), *found["means"].values()):
        kinds = ("auroc", "average_precision", "brier", "log_loss", "expected_calibration_error")
        assert [scores[kind] for kind in kinds] == [None] * 5
    finding = found["findings"][FINDINGS[0]]
    counts = [finding[key] for key in ("positives", "negatives", "unknown", "prevalence")]
    assert counts == [0, 0, 20, None]


def test_no_finding_is_a_finding_of_no_mean() -> None:
    labels = np.concatenate([TRUTH, 1 - TRUTH], axis=1)
    probs = np.concatenate([SPREAD, SPREAD[::-1] ** 2], axis=1)
    with_it = score(make_predictions(labels, probs, names=["Mass", "No Finding"]), Resamples(50))
    without = score(make_predictions(TRUTH, SPREAD, names=["Mass"]), Resamples(50))
    for name, means in without["means"].items():
        for kind in ("auroc", "average_precision", "brier", "log_loss"):
            assert with_it["means"][name][kind] == pytest.approx(means[kind], **EXACT)
    assert with_it["findings"]["No Finding"]["auroc"] is not None


def test_scores_are_plain_numbers() -> None:
    found = score(random_predictions(80, 3, seed=2, unknown=0.2), Resamples(20))
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["intervals", "findings", "means"]


# DeLong's interval where patients have several images


def test_delong_agrees_for_independent_images_and_not_for_copies() -> None:
    single = random_predictions(400, 1, seed=8)
    alone = make_predictions(single.labels, single.probabilities)
    assert only(alone, 1000)["delong"]["agrees"]
    copies = np.repeat(np.arange(400), 6)
    found = only(
        make_predictions(single.labels[copies], single.probabilities[copies], copies), 1000
    )
    assert not found["delong"]["agrees"]
    width = found["auroc"]["high"] - found["auroc"]["low"]
    assert found["delong"]["high"] - found["delong"]["low"] < 0.6 * width, "narrower"
