"""How often an interval holds the true score of a known distribution, of patients with many images.

`benchmarks/intervals.py` does the same with 500 data sets.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import intervals as simulation
from cxr_vit.evaluation.bootstrap import Resamples, intervals


def test_intervals_over_patients_hold_the_truth_and_those_over_images_do_not() -> None:
    found = simulation.coverage(150, patients=150, resamples=200)["percent"]
    for score in simulation.SCORES:
        assert found["over patients"][score] >= 87
        assert found["over images"][score] <= found["over patients"][score] - 6
    assert found["DeLong"]["auroc"] <= found["over patients"]["auroc"] - 6, "images alone"


def test_distribution_has_the_auroc_of_the_closed_form() -> None:
    rows = simulation.draw(np.random.default_rng(0), 20_000)
    count = int(rows.patients.max()) + 1
    found = intervals(simulation.statistic_of(rows), count, Resamples(0))["/auroc/finding"]
    assert found.value == pytest.approx(simulation.exact_auroc(), abs=0.006)
    assert rows.labels.mean() == pytest.approx(simulation.PREVALENCE, abs=0.01)
