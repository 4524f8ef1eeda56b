"""The search, compared with planning every combination."""

from dataclasses import replace
from itertools import product

import pytest
import yaml
from transformers import ViTConfig

from cxr_vit.config import BatchPlan, load_config, read_config
from cxr_vit.config.files import overlay_text, write_new
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.rules import schedule_problem
from cxr_vit.errors import ConfigError
from cxr_vit.planner.estimate import make_plan, plan_evaluation
from cxr_vit.planner.hardware import find_target
from cxr_vit.planner.search import (
    FEWEST_CALLS,
    LONGEST_CALL_S,
    Layout,
    Outputs,
    StatePlacement,
    all_cuts,
    kept_choices,
    search,
)
from cxr_vit.planner.speed import Constants, SpeedModel

from .shapes import DEMO, POD4, ROOT, gpu4, pod4

POD16 = ROOT / "configs" / "vit_pod16.yaml"


def test_every_cut_is_listed_once():
    cuts = [tuple(cut) for cut in all_cuts(5, 3).tolist()]
    expected = [
        (first, middle, last)
        for first, middle, last in product(range(6), repeat=3)
        if first + middle + last == 5 and middle > 0
    ]
    assert sorted(cuts) == expected
    assert len(all_cuts(12, 4)) == 286
    assert all_cuts(3, 1).tolist() == [[3]]


def test_too_few_layers_are_refused():
    with pytest.raises(ConfigError, match="2 layers cannot be cut into 5 stages"):
        all_cuts(2, 5)


def test_kept_outputs_are_evenly_spaced():
    assert kept_choices(0) == [()]
    assert kept_choices(3) == [(), (1,), (0, 1), (0, 1, 2)]


def outputs_to_keep(layers):
    """List what a stage of some layers may keep."""
    halves = [Outputs(tuple(range(layers)), attentions=True)] * (layers > 0)
    return [*map(Outputs, kept_choices(layers)), *halves]


def one_by_one(config, sizes, counts):
    """Plan every combination; return the best speed of each cut and batch that fits."""
    best = {}
    batch = BatchPlan.from_section(config.batch)
    layers, stages = sum(config.pipeline.layers_per_stage), len(config.pipeline.layers_per_stage)
    on_ipus = find_target(config).ipu is not None
    is_pipeline_of_ipus = on_ipus and config.pipeline.execution == "pipelined"
    for cut in all_cuts(layers, stages).tolist():
        # None recomputes nothing, as do stages in order.
        keeps = [None, *product(*map(outputs_to_keep, cut))] if is_pipeline_of_ipus else [None]
        for size, count in product(sizes, counts):
            for on_chip, kept in product((True, False) if on_ipus else (True,), keeps):
                own = replace(batch, micro_batch_size=size, gradient_accumulation=count)
                layout = Layout.of_stages(cut, kept, own, StatePlacement(on_chip, sharded=False))
                laid_out = layout.applied_to(config, on_ipus=on_ipus)
                plan = make_plan(laid_out)
                if plan.fits and not refusals(laid_out, on_ipus):
                    key = (tuple(cut), size, count)
                    best[key] = max(best.get(key, 0.0), plan.samples_per_s)
    return best


def refusals(config, on_ipus):
    if on_ipus:
        return ipu_problems(config)
    return schedule_problem(config, len(config.pipeline.layers_per_stage))


def compare_with_all(config, sizes, counts):
    """Search, and compare with every combination."""
    found = search(config, micro_batches=sizes, accumulations=counts)
    expected = one_by_one(config, sizes, counts)
    speeds = sorted(expected.values(), reverse=True)
    assert len(speeds) > 10, "or nothing is left out"
    best = [row.plan.samples_per_s for row in found.best]
    assert best == pytest.approx(speeds[:10], rel=1e-6)
    for row in found.best:
        key = (tuple(row.layout.layers_per_stage), *row.layout[1:3])
        assert row.plan.samples_per_s == pytest.approx(expected[key], rel=1e-6)
    unfit = [size for size in sizes if not any(key[1] == size for key in expected)]
    assert found.too_large == (unfit[0] if unfit else None)
    return found


#: Settings that need little memory, so that the cut and the kept outputs decide what fits.
LEAN = (
    "engine.weights=fp16",
    "optim.accumulator=fp16",
    "optim.first_moment=fp16",
    "optim.name=sgd",
    "pipeline.recompute=stage_inputs",
)


@pytest.mark.parametrize(
    "overrides",
    [
        ["pipeline.available_memory_proportion=0.1"],
        ["pipeline.available_memory_proportion=0.6"],
        ["pipeline.execution=sharded", "batch.gradient_accumulation=1"],
    ],
    ids=["room", "little room", "sharded"],
)
def test_best_on_ipus_are_those_of_all_combinations(overrides, tmp_path):
    folder = tmp_path / "shallow"
    ViTConfig(
        hidden_size=1024, num_hidden_layers=5, num_attention_heads=16, intermediate_size=4096
    ).save_pretrained(folder)
    config = pod4(f"model.name={folder}", "pipeline.layers_per_stage=[2,2,1]", *LEAN, *overrides)
    found = compare_with_all(config, sizes=(4, 16, 64), counts=(1, 5, 16))
    sharded = "pipeline.execution=sharded" in overrides
    assert list(found.refused) == ([] if sharded else [1])


#: 24 GB.
GPU_MEMORY = f"planner.device_memory_gib={24e9 / 2**30}"


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_best_of_processes_are_those_of_all_combinations(schedule):
    config = gpu4(f"pipeline.schedule={schedule}", GPU_MEMORY)
    # With gpipe the accumulation decides what fits, too.
    found = compare_with_all(config, sizes=(16, 96), counts=(4, 40))
    assert found.refused == {}


def test_gradients_of_a_gpu_count_without_accumulation_too():
    config = gpu4("pipeline.schedule=gpipe", "batch.gradient_accumulation=1", GPU_MEMORY)
    # With 1077 images the gradients are too much.
    compare_with_all(config, sizes=(16, 1077), counts=(1,))


def test_refused_accumulation_has_its_reason():
    found = search(
        gpu4("pipeline.schedule=interleaved_1f1b"), micro_batches=[16], accumulations=[2, 8, 9]
    )
    assert list(found.refused) == [9]
    assert "interleaved_1f1b divides the micro-batches evenly" in found.refused[9]
    found = search(pod4(), accumulations=[4, 7])
    assert list(found.refused) == [4]
    assert "less than the 7 pipeline stages" in found.refused[4]


def test_configuration_with_a_refused_cut_is_searched():
    fixed = search(pod4("pipeline.layers_per_stage=[4,0,4,4]", "pipeline.recompute=every_layer"))
    assert fixed.best[0].layout == search(pod4()).best[0].layout
    assert search(pod4("engine.replicated_tensor_sharding=true")).best


def test_too_many_cuts_are_refused():
    with pytest.raises(ConfigError, match=r"1,037,158,320 ways, too many"):
        all_cuts(32, 16)


def test_global_batch_is_kept():
    found = search(pod4())
    assert len(found.best) == 10
    for row in found.best:
        assert row.plan.work.batch.global_batch_size == 128
        assert row.plan.fits
        assert row.layout.gradient_accumulation >= 7
    speeds = [row.plan.samples_per_s for row in found.best]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 1.5 * make_plan(pod4()).samples_per_s


def test_replicas_share_the_batch_and_may_shard_the_moments():
    config = read_config([POD16])
    found = search(config)
    assert all(row.plan.work.batch.global_batch_size == 128 for row in found.best)
    assert found.tried == 286 * 6 * 4 * 2
    assert all(row.layout.placement.sharded for row in found.best), (
        "as in the configuration, and no slower"
    )
    alone = search(read_config([POD16], ["engine.replicated_tensor_sharding=false"]))
    assert not alone.best[0].layout.placement.sharded
    assert alone.best[0].plan.fullest.memory.share > found.best[0].plan.fullest.memory.share


def test_faster_stages_take_the_least_memory():
    best = search(pod4()).best[0]
    last = best.layout.recompute[-1]
    assert best.plan.by_speed()[0].stage != 3
    assert last != "stage_inputs", "faster, but no other stage waits for the last"


def test_written_layout_overrides_a_configuration(tmp_path):
    found = search(pod4())
    best, path = found.best[0], tmp_path / "best.yaml"
    write_new(path, overlay_text(found.overlay(on_ipus=True), ["how it was found"]))
    config = load_config([POD4, path], ["engine.name=poptorch"])
    assert ipu_problems(config) == []
    assert config.pipeline.layers_per_stage == best.layout.layers_per_stage
    assert config.batch.global_batch_size is None
    assert make_plan(config).seconds == pytest.approx(best.plan.seconds)
    evaluation = found.evaluations[0].evaluation
    assert plan_evaluation(config).plan.seconds == pytest.approx(evaluation.plan.seconds)
    assert path.read_text().startswith("# how it was found\n")
    assert set(yaml.safe_load(path.read_text())) == {"pipeline", "batch", "engine"}


def test_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        write_new(path, overlay_text(search(pod4()).overlay(on_ipus=True), []))
    assert path.read_text() == "mine"


def test_processes_are_searched_by_their_own_rules():
    found = search(gpu4(), micro_batches=[1, 2, 4, 8, 16, 32, 64, 128])
    assert list(found.refused) == [1, 2]
    placement = StatePlacement(on_chip=True, sharded=False)
    assert all(row.layout.placement == placement for row in found.best)
    assert "engine" not in found.best[0].layout.overlay(on_ipus=False)


def test_micro_batches_are_not_searched_while_their_overhead_is_unknown():
    assert {row.layout.micro_batch_size for row in search(gpu4()).best} == {16}
    known = SpeedModel(Constants(1e-3, 1e13), (), 0.05, "")
    assert len({row.layout.micro_batch_size for row in search(gpu4(), model=known).best}) > 1


def test_one_device_has_nothing_to_search():
    with pytest.raises(ConfigError, match="nothing to search"):
        search(read_config([DEMO]))


def test_configuration_that_poptorch_refuses_with_any_layout_is_refused():
    with pytest.raises(ConfigError, match="precision=bf16"):
        search(pod4("engine.precision=bf16"))


def test_refused_evaluation_is_replaced_by_one_that_is_not():
    assert search(pod4("batch.eval_device_iterations=1")).overlay(on_ipus=True) == search(
        pod4()
    ).overlay(on_ipus=True)


#: Little memory, and products that need little: recomputation costs more than what it saves.
ROOMY = ("model.name=vit-tiny", "pipeline.recompute=every_layer")


def test_search_recomputes_nothing_where_everything_fits():
    found = search(pod4(*ROOMY, "engine.weights=fp16"))
    first = found.best[0]
    assert first.layout.recompute == "none"
    assert all(stage.cost.recompute_flops == 0 for stage in first.plan.stages)
    assert found.overlay(on_ipus=True)["pipeline"]["recompute"] == "none"


def test_search_keeps_outputs_of_attention_where_half_a_layer_is_less():
    recompute = search(pod4()).best[0].layout.recompute
    # The last IPU holds one micro-batch: an output of each attention is less than an MLP.
    assert recompute[-1] == "attention_mlp"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["batch.replicas=4"],
        ["pipeline.layers_per_stage=[6,6]", "pipeline.recompute=every_layer"],
        ["pipeline.eval_execution=sharded"],
        ["pipeline.eval_layers_per_stage=[6,6]", "batch.eval_replicas=2"],
        ["planner.hardware=bow", "engine.weights=fp16"],
    ],
)
def test_evaluation_is_the_smallest_call_that_is_about_as_fast_as_the_fastest(overrides):
    config = pod4(*overrides)
    found = search(config)
    first = found.evaluations[0].evaluation
    laid_out = config.changed(**found.overlay(on_ipus=True))
    times = {}
    for size, iterations in product((1 << power for power in range(10)), repeat=2):
        own = laid_out.changed(
            batch={"eval_micro_batch_size": size, "eval_device_iterations": iterations}
        )
        planned = plan_evaluation(own)
        is_allowed = (
            planned.plan.fits
            and not ipu_problems(own)
            and planned.longest_call_s <= LONGEST_CALL_S
            and planned.calls(4327) >= FEWEST_CALLS
        )
        if is_allowed:
            times[size, iterations] = (planned.splits_s, planned.images_per_call)
    fastest_s = min(seconds for seconds, _ in times.values())
    quick = [images for seconds, images in times.values() if seconds <= 1.02 * fastest_s]
    assert first.splits_s <= 1.02 * fastest_s
    assert first.images_per_call == min(quick)


def test_evaluation_of_an_uneven_cut_has_its_own(tmp_path):
    found = search(read_config([POD16]))
    assert found.best[0].layout.layers_per_stage == [2, 3, 3, 4], "the last recomputes less"
    assert found.overlay(on_ipus=True)["pipeline"]["eval_layers_per_stage"] == [3, 3, 3, 3]


def test_evaluation_of_few_images_is_the_smallest_that_is_legal():
    few = pod4("data.root=nowhere", "data.sample_images=40")
    batch = search(few).overlay(on_ipus=True)["batch"]
    assert (batch["eval_micro_batch_size"], batch["eval_device_iterations"]) == (1, 4)


def test_other_devices_have_no_evaluation_to_search():
    found = search(gpu4())
    assert found.evaluations == []
    assert set(found.overlay(on_ipus=False)) == {"pipeline", "batch"}


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match=r"none of the micro-batches \[3, 5\] divides the 128"):
        search(pod4(), micro_batches=[3, 5])
