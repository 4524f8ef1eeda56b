"""DeLong's variance against MLstatkit, the definition, and a worked example."""

from __future__ import annotations

import numpy as np
import pytest
from MLstatkit import Delong_test

from cxr_vit.evaluation.delong import agree, delong_interval, variance
from scored_rows import random_predictions, real_predictions


def by_definition(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the variance of the structural components (DeLong et al. 1988, equation 4)."""
    above, below = scores[truth == 1], scores[truth == 0]
    pairs = (above[:, None] > below) + 0.5 * (above[:, None] == below)
    share_1, share_0 = pairs.mean(axis=1), pairs.mean(axis=0)
    return float(share_1.var(ddof=1) / len(above) + share_0.var(ddof=1) / len(below))


@pytest.mark.parametrize("seed", range(5))
def test_variance_is_that_of_the_definition(seed: int) -> None:
    predictions = random_predictions(150, 1, seed=seed)
    scores, truth = predictions.probabilities[:, 0], predictions.labels[:, 0]
    assert variance(scores, truth) == pytest.approx(by_definition(scores, truth), rel=1e-12)


def compare(scores: np.ndarray, truth: np.ndarray) -> None:
    """Compare the interval with MLstatkit's."""
    other = np.random.default_rng(0).random(len(truth))
    _, _, limits, _, auroc, _, _ = Delong_test(truth, scores, other)
    assert delong_interval(auroc, scores, truth) == pytest.approx(limits, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_interval_is_that_of_mlstatkit(seed: int) -> None:
    predictions = random_predictions(120, 1, seed=seed)
    compare(predictions.probabilities[:, 0], predictions.labels[:, 0])


def test_interval_of_real_labels_is_that_of_mlstatkit() -> None:
    predictions = real_predictions()
    for column in (0, 13):
        compare(predictions.probabilities[:, column], predictions.labels[:, column])


def test_worked_example() -> None:
    """Positives 0.8, 0.5, 0.4 and negatives 0.5, 0.3, 0.1, by hand.

    Shares of negatives below each positive: 1, 5/6, 2/3, variance 1/36. Shares of positives above
    each negative: 1/2, 1, 1, variance 1/12. The sum is (1/36 + 1/12) / 3 = 1/27.
    """
    scores, truth = np.array([0.8, 0.5, 0.4, 0.5, 0.3, 0.1]), np.array([1, 1, 1, 0, 0, 0])
    assert variance(scores, truth) == pytest.approx(1 / 27, rel=1e-12)
    low, high = delong_interval(5 / 6, scores, truth) or (0.0, 0.0)
    assert (low, high) == (pytest.approx(5 / 6 - 1.959964 / 27**0.5, abs=1e-6), 1.0), "cut off"


def test_one_image_of_a_class_has_no_interval() -> None:
    scores = np.array([0.1, 0.2, 0.3])
    assert delong_interval(1.0, scores, np.array([0, 0, 1])) is None
    assert delong_interval(1.0, scores, np.array([0, 1, 1])) is None
    assert delong_interval(1.0, scores, np.array([1, 1, 1])) is None


def test_agreement_is_a_share_of_the_width() -> None:
    assert agree((0.80, 0.90), (0.80, 0.90))
    assert agree((0.81, 0.89), (0.80, 0.90))
    assert not agree((0.82, 0.90), (0.80, 0.90))
    assert agree((1.0, 1.0), (1.0, 1.0))
