"""Calibration error, reliability bins, and scaling of probabilities."""

from __future__ import annotations

from typing import Tuple

import numpy as np
import pytest

from cxr_vit.evaluation.calibration import expected_calibration_error, reliability


def _scores(images: int, seed: int = 0) -> Tuple[np.ndarray, np.ndarray]:
    """Return calibrated probabilities, float32, and truth drawn from them."""
    generator = np.random.default_rng(seed)
    probabilities = generator.beta(0.5, 4, images).astype(np.float32)
    return probabilities, (generator.random(images) < probabilities).astype(np.int8)


def test_bins_have_equal_mass_and_the_means_of_their_images() -> None:
    probabilities, truth = _scores(1501)
    bins = reliability(probabilities, truth)
    order = np.argsort(probabilities, kind="stable")
    edges = [index * 1501 // 15 for index in range(16)]
    for index, (first, end) in enumerate(zip(edges, edges[1:])):
        rows = order[first:end]
        assert bins.images[index] == len(rows)
        assert bins.mean[index] == pytest.approx(probabilities[rows].astype(float).mean(), rel=1e-9)
        assert bins.rate[index] == truth[rows].mean()


def test_images_of_the_same_probability_are_in_one_bin() -> None:
    probabilities = np.repeat(np.float32([0.1, 0.2, 0.9]), [700, 2, 298])
    bins = reliability(probabilities, np.zeros(1000, np.int8))
    assert bins.images.tolist() == [702, 298]
    assert reliability(np.full(500, 0.3), np.ones(500)).images.tolist() == [500]


@pytest.mark.parametrize(("images", "bins"), [(1, 1), (19, 1), (20, 2), (149, 14), (150, 15)])
def test_few_images_have_fewer_bins(images: int, bins: int) -> None:
    probabilities = np.linspace(0.01, 0.99, images)
    assert len(reliability(probabilities, np.zeros(images)).images) == bins


def test_the_error_is_that_of_samples_of_the_normal_distribution() -> None:
    """Repeats `normal_debiased_ce` of the library of Kumar et al., which draws 1,000 samples."""
    probabilities, truth = _scores(2000)
    bins = reliability(probabilities, truth)
    deviations = np.sqrt(bins.rate * (1 - bins.rate) / bins.images)
    drawn = np.random.default_rng(1).normal(bins.rate, deviations, (200_000, len(bins.rate)))
    share = bins.images / bins.images.sum()
    plugin = share @ np.abs(bins.rate - bins.mean)
    resampled = (np.abs(drawn - bins.mean) @ share).mean()
    expected = 2 * plugin - resampled
    assert expected_calibration_error(probabilities, truth) == pytest.approx(expected, abs=3e-5)


def test_the_bias_of_the_error_is_smaller_than_without_the_correction() -> None:
    errors, plugins, truths = [], [], []
    for seed in range(100):
        generator = np.random.default_rng(seed)
        rate = generator.beta(0.5, 4, 1000)
        truth = generator.random(1000) < rate
        probabilities = rate / (rate + (1 - rate) * np.exp(-0.4))  # logits 0.4 too high
        bins = reliability(probabilities, truth)
        plugins.append(np.average(np.abs(bins.rate - bins.mean), weights=bins.images))
        errors.append(expected_calibration_error(probabilities, truth))
        truths.append(np.abs(probabilities - rate).mean())
    true = np.mean(truths)
    assert abs(np.mean(errors) - true) < 0.4 * (np.mean(plugins) - true)


def test_errors_that_are_known() -> None:
    half = np.full(1000, 0.5)
    assert expected_calibration_error(half, np.arange(1000) % 2) == 0.0
    # Without positives there is no noise to correct.
    assert expected_calibration_error(half, np.zeros(1000)) == 0.5
    assert expected_calibration_error(np.zeros(1000), np.zeros(1000)) == 0.0
    assert expected_calibration_error(np.float32([0.25]), np.int8([1])) == 0.75
    assert expected_calibration_error(np.float32([]), np.int8([])) is None
