import numpy as np
import pytest
from example_metrics import random_predictions

from cxr_vit.evaluation.curves import curves, rounded_up, svg_points, thinned
from cxr_vit.evaluation.statistics import Ranking


def area(points):
    x, y = np.array(points).T
    return float(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum())


def distances(x, y, points):
    """Distance of each point from the nearest of the lines, by brute force."""
    points = np.array(points)
    starts, lines = points[:-1], points[1:] - points[:-1]
    offsets = np.stack([x, y], axis=1)[:, None] - starts
    along = (offsets * lines).sum(axis=2) / np.maximum((lines**2).sum(axis=1), 1e-12)
    return np.hypot(*(offsets - along.clip(0, 1)[..., None] * lines).T).min(axis=0)


@pytest.mark.parametrize("decimals", [1, 7], ids=["tied", "different"])
def test_areas_are_auroc_and_average_precision(decimals):
    predictions = random_predictions(["one", "other"], images=3000)
    for column in (0, 1):
        labels = predictions.labels[:, column]
        scores = predictions.probabilities[:, column].round(decimals)
        found = curves(scores, labels)
        ranking = Ranking(scores, labels, np.zeros(3000, np.int64))
        auroc, precision, _ = ranking.of(np.ones((1, 1), np.int64))[0]
        assert area(found.roc) == pytest.approx(auroc, abs=1e-3)
        assert area(found.precision_recall) == pytest.approx(precision, abs=2e-3)
        assert found.roc[0] == (0, 0) and found.roc[-1] == (1, 1)
        assert found.precision_recall[-1] == (1, pytest.approx(labels.mean()))
        assert max(map(len, found)) <= 200


def test_perfect_scores_have_three_points():
    found = curves(np.array([0.9, 0.8, 0.2, 0.1]), np.array([1, 1, 0, 0]))
    assert found.roc == [(0, 0), (0, 1), (1, 1)]
    assert area(found.precision_recall) == 1


def test_unknown_labels_are_left_out():
    labels, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.4, 0.3])
    with_unknown = curves(np.append(scores, 0.5), np.append(labels, -1))
    assert with_unknown == curves(scores, labels)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], [-1, -1], [1, -1]])
def test_label_of_one_kind_has_no_curves(labels):
    assert curves(np.array([0.3, 0.6]), np.array(labels)) is None


def test_points_that_are_left_out_are_near_the_lines():
    x = np.linspace(0, 1, 20_000)
    y = np.sqrt(x)
    found = thinned(x, y)
    assert len(found) < 100
    assert distances(x[::20], y[::20], found).max() <= 0.001


def test_jagged_curve_has_200_points_at_most():
    random = np.random.default_rng(0)
    x, y = np.linspace(0, 1, 2000), random.random(2000)
    found = thinned(x, y)
    assert 20 < len(found) <= 200
    assert found[0] == (x[0], y[0]) and found[-1] == (x[-1], y[-1])
    assert set(found) <= set(zip(x, y))


def test_points_have_their_origin_at_the_lower_left():
    assert svg_points([(0, 0), (0.5, 0.25, 7)], 100) == "0.0,100.0 50.0,75.0"
    assert svg_points([(0.1, 0.2)], 100, most=0.2) == "50.0,0.0"


@pytest.mark.parametrize(("value", "end"), [(0.004, 0.01), (0.05, 0.05), (0.051, 0.1), (0.7, 1)])
def test_axis_ends_at_a_round_number(value, end):
    assert rounded_up(value) == end
