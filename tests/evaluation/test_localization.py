"""Scores of maps against boxes: hand-made ones, a raster, and a bootstrap in a loop."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from cxr_vit.data.records import Records
from cxr_vit.evaluation.bootstrap import Resamples
from cxr_vit.evaluation.localization import (
    CENTER_RADIUS,
    SCORES,
    Pair,
    boxed_pairs,
    center_map,
    covered,
    localization,
    map_scores,
    random_scores,
    rank_correlations,
    similarity,
)


def records(*boxes):
    """Return the records of three images, with boxes ``(row, finding, x, y, width, height)``."""
    table = pd.DataFrame({"image": ["a", "b", "c"], "patient": [1, 1, 2]})
    names = ["row", "finding", "x", "y", "width", "height"]
    return Records(table, np.zeros((3, 14), np.int8), pd.DataFrame(boxes, columns=names))


def score(values, *boxes):
    """Return the scores of one map, by name."""
    (found,) = map_scores(np.array([values], np.float32), np.array(boxes, np.float64))
    return dict(zip(SCORES, found))


def test_boxes_are_shares_of_the_image_where_all_of_it_is_seen():
    pairs = boxed_pairs(
        records(
            (2, "Mass", 256, 512, 128, 256), (0, "Mass", 0, 0, 1024, 1024), (2, "Edema", 0, 0, 1, 2)
        ),
        read_size=64,
        image_size=64,
    )
    assert [(pair.finding, pair.row) for pair in pairs] == [("Edema", 2), ("Mass", 0), ("Mass", 2)]
    assert pairs[2].boxes.tolist() == [[0.25, 0.5, 0.375, 0.75]]


def test_boxes_are_cut_off_where_the_model_does_not_look():
    # 1024 pixels become 40, of which the model sees those from 4 to 36: 102.4 to 921.6.
    whole = (0, "Mass", 512, 512, 102.4, 102.4)
    partly = (0, "Mass", 0, 512, 204.8, 512)
    outside = (1, "Mass", 0, 0, 102.4, 1024)
    first, second = boxed_pairs(records(whole, partly, outside), read_size=40, image_size=32)
    np.testing.assert_allclose(first.boxes, [[0.5, 0.5, 0.625, 0.625], [0.0, 0.5, 0.125, 1.0]])
    assert second.boxes.shape == (0, 4)
    # An odd margin: the upper left part is the smaller one, as in `View`.
    (odd,) = boxed_pairs(records((0, "Mass", 0, 0, 1024, 1024)), read_size=37, image_size=32)
    assert odd.boxes.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    (point,) = boxed_pairs(records((0, "Mass", 512, 512, 512, 512)), read_size=37, image_size=32)
    np.testing.assert_allclose(point.boxes[0, :2], (37 / 2 - 2) / 32)


def test_known_map_and_boxes():
    values = [[0, 0, 0, 0], [0, 4, 2, 0], [0, 1.9, 0, 0], [0, 0, 0, 3]]
    box = [0.25, 0.25, 0.5, 0.5]  # the cell with 4
    found = score(values, box)
    # The region is the cells of 4, 2 and 3; it shares one with the box.
    expected = {"pointing_game": 1.0, "iou": 1 / 3, "iou_from_0.1": 1.0, "iou_from_0.3": 1.0}
    assert found == pytest.approx(expected)
    half = [0.375, 0.25, 0.625, 0.5]  # half of the cell with 4, half of that with 2
    assert score(values, half)["iou"] == pytest.approx(1 / 3)
    # The union of two boxes counts once where they overlap.
    assert score(values, box, [0.25, 0.25, 0.5, 0.4]) == pytest.approx(expected)
    assert score(values, [0.9, 0.0, 1.0, 0.1]) == dict.fromkeys(SCORES, 0.0)


def test_maximum_is_the_center_of_its_cell():
    values = [[0, 0], [0, 1]]
    assert score(values, [0.7, 0.7, 0.8, 0.8])["pointing_game"] == 1.0
    assert score(values, [0.5, 0.5, 0.74, 0.74])["pointing_game"] == 0.0
    # Of two boxes that touch there, one has it.
    assert score(values, [0.75, 0.5, 1.0, 1.0])["pointing_game"] == 1.0
    assert score(values, [0.5, 0.5, 0.75, 1.0])["pointing_game"] == 0.0


def test_equal_maxima_count_by_their_share():
    values = [[5, 0, 5], [0, 0, 0], [5, 0, 5]]
    assert score(values, [0, 0, 0.3, 0.3])["pointing_game"] == 0.25
    assert score(values, [0, 0, 1, 0.3])["pointing_game"] == 0.5
    # A map of zeros says nothing: as good as a point at random, and its region is everything.
    nothing = score(np.zeros((4, 4)), [0, 0, 0.5, 1])
    assert (nothing["pointing_game"], nothing["iou"]) == (0.5, 0.5)


def test_areas_are_those_of_a_raster():
    random = np.random.default_rng(0)
    for _ in range(20):
        corners = np.sort(random.integers(0, 61, (3, 2, 2)), axis=1)  # 60 x 60 pixels
        boxes = corners.reshape(3, 4)
        raster = np.zeros((60, 60))
        for left, top, right, low in boxes:
            raster[top:low, left:right] = 1
        expected = raster.reshape(6, 10, 4, 15).mean(axis=(1, 3))
        np.testing.assert_allclose(covered(boxes / 60, 6, 4), expected, atol=1e-12)


def test_baselines():
    center = center_map()
    assert np.unravel_index(center.argmax(), center.shape) == (32, 32)
    disc = np.pi * CENTER_RADIUS**2
    assert (center >= 0.5).mean() == pytest.approx(disc, rel=0.02)
    pair = Pair(3, "Mass", np.array([[0.0, 0.0, 0.5, 1.0]]))
    scores = random_scores(pair, (8, 8))
    assert scores.tolist() == random_scores(pair, (8, 8)).tolist()
    assert scores[0] == pytest.approx(0.5, abs=0.15)
    # Half of the cells are in the region, and half of these in the box.
    assert scores[1] == pytest.approx(1 / 3, abs=0.02)


def drawn(patients, count=12, seed=1):
    """Return scores of maps and of a baseline, and findings of one pair for each patient number."""
    random = np.random.default_rng(seed)
    maps, other = random.random((2, len(patients), len(SCORES)))
    findings = [("Mass", "Edema", "Nodule")[row % 3] for row in range(len(patients))]
    return {"maps": maps, "center": other}, findings


def test_intervals_and_differences_are_those_of_a_loop_over_the_same_patients():
    patients = np.repeat(np.arange(15), 3)
    scores, findings = drawn(patients)
    resamples = Resamples(60, 7)
    found = localization(scores, findings, patients, resamples)
    is_mass = np.array(findings) == "Mass"
    means, differences, macros = [], [], []
    for index in range(60):
        rows = np.repeat(np.arange(45), resamples.weights(index, 15)[patients])
        mass = rows[is_mass[rows]]
        means.append(scores["maps"][mass, 1].mean())
        change = scores["maps"][:, 0] - scores["center"][:, 0]
        differences.append(change[rows].mean())
        by_finding = [
            change[rows[np.array(findings)[rows] == name]].mean() for name in set(findings)
        ]
        macros.append(np.mean(by_finding))
    for value, loop in (
        (found["scores"]["maps"]["iou"]["Mass"], means),
        (found["differences"]["center"]["pointing_game"]["all"], differences),
        (found["differences"]["center"]["pointing_game"]["macro"], macros),
    ):
        limits = np.quantile(loop, [0.025, 0.975])
        assert [value["low"], value["high"]] == pytest.approx(limits.tolist())
    assert found["scores"]["maps"]["iou"]["all"]["value"] == pytest.approx(
        scores["maps"][:, 1].mean()
    )
    assert found["intervals"]["patients"] == 15


def test_few_patients_have_no_interval():
    patients = np.arange(9)
    scores, findings = drawn(patients)
    found = localization(scores, findings, patients, Resamples(20))
    assert found["scores"]["maps"]["iou"]["all"]["low"] is None
    patients = np.arange(12)  # 4 with each finding
    scores, findings = drawn(patients)
    of_iou = localization(scores, findings, patients, Resamples(20))["scores"]["maps"]["iou"]
    assert of_iou["Mass"]["low"] is None
    assert of_iou["all"]["low"] < of_iou["all"]["value"] < of_iou["all"]["high"]


def test_rank_correlations_are_those_of_scipy():
    random = np.random.default_rng(0)
    maps, others = random.integers(0, 5, (2, 4, 3, 5)).astype(np.float32)  # with ties
    others[3] = 2.0
    found = rank_correlations(maps, others)
    expected = [spearmanr(a.ravel(), b.ravel())[0] for a, b in zip(maps[:3], others)]
    np.testing.assert_allclose(found[:3], expected)
    assert np.isnan(found[3])
    np.testing.assert_allclose(rank_correlations(maps, maps**3), 1.0)


def test_undefined_correlations_are_left_out_and_counted():
    values = np.linspace(0.0, 1.0, 12)
    values[:2] = np.nan
    given = {"head": values, "layer 0": np.full(12, np.nan)}
    head, layer = similarity(given, np.arange(12), Resamples(50))
    assert (head["randomised"], head["undefined"]) == ("head", 2)
    assert head["correlation"]["value"] == pytest.approx(np.nanmean(values))
    assert head["correlation"]["low"] is not None
    assert (layer["correlation"], layer["undefined"]) == (None, 12)
