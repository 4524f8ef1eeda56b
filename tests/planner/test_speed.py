"""The two constants of the speed, and what they say of the published runs."""

import pytest

from cxr_vit.planner.estimate import make_plan
from cxr_vit.planner.hardware import HARDWARE, PUBLISHED, TUTORIAL, Sourced
from cxr_vit.planner.speed import (
    Measured,
    SpeedModel,
    fit,
    published_corners,
    published_model,
    published_workload,
    workload,
)

from .shapes import pod4

BOW, MK2 = HARDWARE["bow"], HARDWARE["mk2"]
POD16 = [run for run in PUBLISHED if run.hardware == "bow"]


def predicted(run):
    work = published_workload(run)
    return work.samples / work.seconds(published_model(work.hardware))


@pytest.mark.parametrize("run", POD16, ids=lambda run: run.what)
def test_the_published_runs_on_a_bow_pod16_within_five_percent(run):
    # graphcore.cn/performance-results, SDK 3.0: 7,319 and 7,615 items/s
    assert run.samples_per_s in (7319, 7615)
    assert predicted(run) == pytest.approx(run.samples_per_s, rel=0.05)


def test_the_constants_are_those_of_the_published_line():
    # peers 3.6: a cycle of 1.04 ms + 0.394 ms an image on Bow, three layers and recomputation
    model = published_model(BOW)
    work = workload(pod4("pipeline.recompute=every_layer", "planner.hardware=bow"), BOW)
    slope_s = max(cost.flops for cost in work.costs) / model.flops_per_s(BOW, "fp16")
    assert 1e3 * model.start_s(BOW) == pytest.approx(1.04, abs=0.01)
    assert 1e3 * slope_s == pytest.approx(0.394, abs=0.002)
    assert model.efficiency == pytest.approx(0.25, abs=0.01)


def test_a_mk2_is_slower_by_its_clock():
    # peers 3.6: 1.46 + 0.55 ms an image
    model = published_model(MK2)
    assert model == published_model(BOW)
    assert 1e3 * model.start_s(MK2) == pytest.approx(1.46, abs=0.02)


def test_the_tutorial_lies_below_the_prediction():
    # peers 3.6: about 475 for 1 x 128 on a Mk2 POD4, 307.7 printed
    plan = make_plan(pod4())
    assert plan.samples_per_s == pytest.approx(475, rel=0.02)
    assert TUTORIAL.samples_per_s < predicted(TUTORIAL) < plan.samples_per_s


def test_below_the_published_micro_batches_the_range_is_wide():
    wide, narrow = (
        make_plan(pod4(f"batch.micro_batch_size={size}")).speed_range for size in (1, 16)
    )
    assert wide[1] / wide[0] > 2
    assert narrow[1] / narrow[0] < 1.15
    assert len(published_corners(MK2)) == 4


@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=HARDWARE)
def test_every_number_names_its_source(hardware):
    numbers = [value for value in hardware if isinstance(value, Sourced)]
    assert len(numbers) == 9
    assert all(len(number.source) > 10 and number.value > 0 for number in numbers)


def measured(model, *overrides):
    work = workload(pod4("planner.hardware=bow", *overrides), BOW)
    return Measured(work, work.seconds(model))


TRUE = SpeedModel(start_cycles=3e6, efficiency=0.4, basis="")


def test_two_kinds_of_runs_give_both_constants_back():
    runs = [measured(TRUE, f"batch.micro_batch_size={size}") for size in (1, 4, 16)]
    found = fit(runs, published_model(BOW), "mine")
    assert found.start_cycles == pytest.approx(TRUE.start_cycles, rel=1e-6)
    assert found.efficiency == pytest.approx(TRUE.efficiency, rel=1e-6)
    assert found.basis == "mine"


def test_one_kind_of_run_scales_both():
    prior = published_model(BOW)
    (run,) = runs = [measured(TRUE)]
    found = fit(runs, prior, "mine")
    assert run.workload.seconds(found) == pytest.approx(run.seconds, rel=1e-9)
    ratio = found.start_cycles * found.efficiency
    assert ratio == pytest.approx(prior.start_cycles * prior.efficiency)


def test_a_start_is_never_negative():
    slow = [measured(TRUE, f"batch.micro_batch_size={size}") for size in (1, 16)]
    faster_when_small = [Measured(slow[0].workload, slow[0].seconds / 20), slow[1]]
    found = fit(faster_when_small, published_model(BOW), "")
    assert found.start_cycles == 0
    assert found.efficiency > 0


def test_moments_off_the_chip_and_replicas_lengthen_the_update():
    def update(*overrides):
        return max(workload(pod4(*overrides), MK2).update_s)

    on_chip = update()
    assert update("engine.optimizer_state_on_chip=false") > 100 * on_chip
    assert update("batch.replicas=4") > 10 * on_chip


def test_sharded_stages_take_turns_and_compute_nothing_again():
    work = workload(pod4("pipeline.execution=sharded"), MK2)
    assert work.schedule == "in_order"
    assert all(cost.recompute_flops == 0 for cost in work.costs)
    model = published_model(MK2)
    times = work.stage_times(model)
    assert work.seconds(model) == pytest.approx(
        128 * sum(time.micro_batch_s for time in times) + max(work.update_s)
    )


def test_fp32_is_slower_by_the_ratio_of_the_peaks():
    model = published_model(MK2)
    assert model.flops_per_s(MK2, "fp16") == 4 * model.flops_per_s(MK2, "fp32")
