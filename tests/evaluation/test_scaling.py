"""Temperature and Platt scaling of a label's probabilities."""

from __future__ import annotations

import warnings
from typing import Any, List, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cxr_vit.evaluation.scaling import fit_platt, fit_temperature, scaled


def _scores(images: int, slope: float = 1.0, intercept: float = 0.0) -> Tuple[Any, Any]:
    """Return float32 probabilities whose logits, scaled by the arguments, are calibrated."""
    generator = np.random.default_rng(0)
    logits = generator.normal(-2, 1.5, images)
    rates = 1 / (1 + np.exp(-(slope * logits + intercept)))
    truth = (generator.random(images) < rates).astype(np.int8)
    return (1 / (1 + np.exp(-logits))).astype(np.float32), truth


def _regression(probabilities: Any, truth: Any, *, with_intercept: bool) -> LogisticRegression:
    logits = np.log(probabilities.astype(float)) - np.log1p(-probabilities.astype(float))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how to ask for no penalty changed in scikit-learn 1.8
        model = LogisticRegression(
            penalty=None, fit_intercept=with_intercept, solver="newton-cholesky", tol=1e-12
        )
        return model.fit(logits[:, None], truth)


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0.4, -1), (2.5, 1), (0.1, -3)])
def test_fits_are_those_of_scikit_learn(slope: float, intercept: float) -> None:
    probabilities, truth = _scores(5000, slope, intercept)
    platt = fit_platt(probabilities, truth)
    expected = _regression(probabilities, truth, with_intercept=True)
    assert platt == pytest.approx((expected.coef_[0, 0], expected.intercept_[0]), rel=1e-6)
    temperature = fit_temperature(probabilities, truth)
    expected = _regression(probabilities, truth, with_intercept=False)
    assert temperature == pytest.approx(1 / expected.coef_[0, 0], rel=1e-6)


def test_calibrated_probabilities_stay_as_they_are() -> None:
    probabilities, truth = _scores(200_000)
    assert fit_temperature(probabilities, truth) == pytest.approx(1.0, abs=0.02)
    assert fit_platt(probabilities, truth) == pytest.approx((1.0, 0.0), abs=0.03)
    again = scaled(probabilities, 1.0)
    assert again.dtype == np.float64
    assert np.allclose(again, probabilities, rtol=1e-12, atol=0)


def test_scaling_twice_changes_nothing_more() -> None:
    probabilities, truth = _scores(3000, 0.5, 1.0)
    platt, temperature = fit_platt(probabilities, truth), fit_temperature(probabilities, truth)
    assert platt is not None and temperature is not None
    assert fit_platt(scaled(probabilities, *platt), truth) == pytest.approx((1, 0), abs=1e-9)
    again = fit_temperature(scaled(probabilities, 1 / temperature), truth)
    assert again == pytest.approx(1, abs=1e-9)


def test_scaling_keeps_the_ranking() -> None:
    probabilities, truth = _scores(3000, 0.2, -1.0)
    platt = fit_platt(probabilities, truth)
    assert platt is not None and platt[0] > 0
    before = roc_auc_score(truth, probabilities)
    assert roc_auc_score(truth, scaled(probabilities, *platt)) == before
    assert roc_auc_score(truth, scaled(probabilities, 0.01)) == before


def test_ends_of_the_range_stay_finite() -> None:
    ends = np.array([0, 1e-30, 0.5, 1], np.float32)
    for slope in (1e-6, 1.0, 1e6):
        values = scaled(ends, slope, 5.0)
        assert np.isfinite(values).all() and ((values >= 0) & (values <= 1)).all()
        assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize(("positives", "negatives"), [(9, 500), (500, 9), (0, 500), (500, 0)])
def test_few_images_of_a_kind_are_not_fitted(positives: int, negatives: int) -> None:
    truth = np.repeat([1, 0], [positives, negatives])
    probabilities = np.random.default_rng(0).random(len(truth))
    assert fit_temperature(probabilities, truth) is None
    assert fit_platt(probabilities, truth) is None


def test_ten_images_of_a_kind_are_fitted() -> None:
    truth = np.repeat([1, 0], [10, 30])
    probabilities = np.clip(0.3 * truth + np.random.default_rng(0).random(40), 0, 1)
    assert fit_platt(probabilities, truth) is not None
    assert fit_temperature(probabilities, truth) is not None


def test_separable_labels_are_not_fitted() -> None:
    truth = np.repeat([0, 1], [50, 20])
    probabilities = np.linspace(0.1, 0.4, 70)
    assert fit_platt(probabilities, truth) is None
    assert fit_platt(probabilities[::-1], truth) is None, "separated the wrong way round"
    probabilities[50] = probabilities[49]
    assert fit_platt(probabilities, truth) is None, "tied at the threshold"
    assert fit_temperature(np.where(truth == 1, 0.6, 0.3), truth) is None, "all signs are right"
    assert fit_temperature(np.where(truth == 1, 0.3, 0.6), truth) is None, "all signs are wrong"
    assert fit_platt(np.full(70, 0.2), truth) is None
    assert fit_temperature(np.full(70, 0.5), truth) is None


def test_scores_that_rank_the_wrong_way_round_are_not_reversed() -> None:
    probabilities, truth = _scores(3000)
    assert fit_platt(probabilities, 1 - truth) is None
    # Most images have a logit above 0, most of them are negative.
    assert fit_temperature(scaled(probabilities, 1.0, 6.0), truth) is None
    assert fit_platt(scaled(probabilities, 1.0, 6.0), truth) is not None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1, width=32), st.integers(0, 1)),
        min_size=20,
        max_size=60,
    )
)
def test_any_images_give_a_usable_fit_or_none(images: List[Tuple[float, int]]) -> None:
    probabilities = np.array([each[0] for each in images], np.float32)
    truth = np.array([each[1] for each in images], np.int8)
    temperature, platt = fit_temperature(probabilities, truth), fit_platt(probabilities, truth)
    if temperature is not None:
        assert 0 < temperature < np.inf
        assert _loss(scaled(probabilities, 1 / temperature), truth) <= _loss(
            scaled(probabilities, 1.0), truth
        ) + 1e-9 * len(truth)
    if platt is not None:
        assert 0 < platt[0] < np.inf and np.isfinite(platt[1])
        assert _loss(scaled(probabilities, *platt), truth) <= _loss(
            scaled(probabilities, 1.0), truth
        ) + 1e-9 * len(truth)


def _loss(probabilities: Any, truth: Any) -> float:
    with np.errstate(divide="ignore"):
        return float(-np.log(np.where(truth == 1, probabilities, 1 - probabilities)).sum())
