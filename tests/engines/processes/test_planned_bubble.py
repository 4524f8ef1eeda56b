"""The planner's bubble against that of 1F1B on four real processes whose stages sleep."""

import json
import statistics

import numpy as np
import pytest

from cxr_vit.planner.timeline import StageTime, simulate

from .launch import finish, fork, needs_pipelining

COUNTS = (4, 12)
TINY = (
    *("model.name=vit-micro", "model.patch_size=16", "data.image_size=32"),
    *("pipeline.layers_per_stage=[1,1,1,1]", "batch.micro_batch_size=1"),
    *("engine.name=pipeline", "engine.device=cpu", "engine.precision=fp32"),
)


def update_seconds(sleeps_ms, out):
    """Time updates of four processes; return the median by number of micro-batches."""
    done = finish(
        fork(
            *(4, "-m", "benchmarks.pipeline_worker", *TINY, "--out", out, "--schedules", "1f1b"),
            *("--micro-batches", *COUNTS, "--rounds", 2, "--warm-steps", 1),
            *("--stage-ms", *sleeps_ms),
        )
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    seconds = {count: [] for count in COUNTS}
    for case in json.loads(out.read_text()):
        seconds[case["micro_batches"]] += case["seconds"]
    return {count: statistics.median(values) for count, values in seconds.items()}


@needs_pipelining
@pytest.mark.parametrize(
    "sleeps_ms",
    [
        pytest.param((25, 25, 25, 25), id="even", marks=pytest.mark.exhaustive),
        pytest.param((15, 15, 30, 15), id="uneven"),
    ],
)
def test_measured_bubble_is_within_ten_points_of_the_plan(sleeps_ms, tmp_path):
    measured = update_seconds(sleeps_ms, tmp_path / "measured.json")
    counts, seconds = np.array(list(measured)), np.array(list(measured.values()))
    # The slope is the time per micro-batch in the steady state, without the cost per update.
    steady_s = np.polyfit(counts, seconds, 1, w=1 / seconds)[0]
    times = [StageTime(sleep, 0.0, 2 * sleep) for sleep in sleeps_ms]
    for count, update_s in measured.items():
        planned = 1 - count * 3 * max(sleeps_ms) / simulate("1f1b", times, count).work_s
        assert 1 - count * steady_s / update_s == pytest.approx(planned, abs=0.10), count
