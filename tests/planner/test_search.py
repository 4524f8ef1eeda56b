"""The search, against trying everything one by one."""

from itertools import product

import pytest
import yaml
from transformers import ViTConfig

from cxr_vit.config import check, load_config
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.rules import schedule_problem
from cxr_vit.errors import ConfigError
from cxr_vit.planner.estimate import choose_hardware, make_plan
from cxr_vit.planner.search import Layout, all_cuts, kept_choices, search

from .shapes import POD4, ROOT, pod4

POD16 = ROOT / "configs" / "vit_pod16.yaml"


def test_every_cut_is_there_once():
    cuts = [tuple(cut) for cut in all_cuts(5, 3).tolist()]
    expected = [
        (first, middle, last)
        for first, middle, last in product(range(6), repeat=3)
        if first + middle + last == 5 and middle > 0
    ]
    assert sorted(cuts) == expected
    assert len(all_cuts(12, 4)) == 286
    assert all_cuts(3, 1).tolist() == [[3]]


def test_too_few_layers_are_a_mistake():
    with pytest.raises(ConfigError, match="2 layers cannot be cut into 5 stages"):
        all_cuts(2, 5)


def test_outputs_may_be_kept_evenly():
    assert kept_choices(0) == [()]
    assert kept_choices(3) == [(), (1,), (0, 1), (0, 1, 2)]


def one_by_one(config, sizes, counts):
    """Plan every combination whole; return the best speed of each cut and batch that fits."""
    best = {}
    layers, stages = sum(config.pipeline.layers_per_stage), len(config.pipeline.layers_per_stage)
    on_ipus = choose_hardware(config).is_ipu
    for cut in all_cuts(layers, stages).tolist():
        keeps = [kept_choices(own) if on_ipus else [()] for own in cut]
        for size, count in product(sizes, counts):
            for on_chip, *kept in product((True, False) if on_ipus else (True,), *keeps):
                layout = Layout.of_stages(
                    cut,
                    kept,
                    micro_batch_size=size,
                    gradient_accumulation=count,
                    placement=(on_chip, False),
                )
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


def hold_against_all(config, sizes, counts):
    """Search, and compare with every combination."""
    found = search(config, micro_batches=sizes, accumulations=counts)
    expected = one_by_one(config, sizes, counts)
    speeds = sorted(expected.values(), reverse=True)
    assert len(speeds) > 10, "else nothing is left out"
    best = [row.plan.samples_per_s for row in found.best]
    assert best == pytest.approx(speeds[:10], rel=1e-6)
    for row in found.best:
        key = (tuple(row.layout.layers_per_stage), *row.layout[1:3])
        assert row.plan.samples_per_s == pytest.approx(expected[key], rel=1e-6)
    unfit = [size for size in sizes if not any(key[1] == size for key in expected)]
    assert found.too_large == (unfit[0] if unfit else None)
    return found


#: Settings that need little, so that what fits depends on the cut and on what is kept.
LEAN = (
    *("engine.weights=fp16", "optim.accumulator=fp16", "optim.first_moment=fp16"),
    *("optim.name=sgd", "pipeline.recompute=stage_inputs"),
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
def test_the_best_on_ipus_are_those_of_all(overrides, tmp_path):
    folder = tmp_path / "shallow"
    ViTConfig(
        hidden_size=1024, num_hidden_layers=6, num_attention_heads=16, intermediate_size=4096
    ).save_pretrained(folder)
    config = pod4(f"model.name={folder}", "pipeline.layers_per_stage=[2,2,2]", *LEAN, *overrides)
    found = hold_against_all(config, sizes=(4, 16, 64), counts=(1, 5, 16))
    sharded = "pipeline.execution=sharded" in overrides
    assert list(found.refused) == ([] if sharded else [1])


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_best_of_processes_are_those_of_all(schedule):
    config = load_config([ROOT / "configs" / "vit_gpu4.yaml"], [f"pipeline.schedule={schedule}"])
    # With gpipe what fits depends on the accumulation.
    found = hold_against_all(config, sizes=(16, 96), counts=(4, 40))
    assert found.refused == {}


def test_a_gpu_holds_its_gradients_without_accumulation_too():
    gpipe = ["pipeline.schedule=gpipe", "batch.gradient_accumulation=1"]
    config = load_config([ROOT / "configs" / "vit_gpu4.yaml"], gpipe)
    # At 1077 images the gradients are what is too much.
    hold_against_all(config, sizes=(16, 1077), counts=(1,))


def test_what_a_schedule_refuses_is_refused_with_its_reason():
    interleaved = ["pipeline.schedule=interleaved_1f1b"]
    config = load_config([ROOT / "configs" / "vit_gpu4.yaml"], interleaved)
    found = search(config, micro_batches=[16], accumulations=[2, 8, 9])
    assert list(found.refused) == [9]
    assert "interleaved_1f1b divides the micro-batches evenly" in found.refused[9]
    found = search(pod4(), accumulations=[4, 7])
    assert list(found.refused) == [4]
    assert "less than the 7 pipeline stages" in found.refused[4]


def test_a_cut_that_is_refused_is_searched_all_the_same():
    mended = search(pod4("pipeline.layers_per_stage=[4,0,4,4]", "pipeline.recompute=every_layer"))
    assert mended.best[0].layout == search(pod4()).best[0].layout
    assert search(pod4("engine.replicated_tensor_sharding=true")).best


def test_too_many_cuts_are_a_mistake():
    with pytest.raises(ConfigError, match=r"1,037,158,320 ways, too many"):
        all_cuts(32, 16)


def test_the_global_batch_is_held():
    found = search(pod4())
    assert len(found.best) == 10
    for row in found.best:
        assert row.plan.work.samples == 128
        assert row.plan.fits
        assert row.layout.gradient_accumulation >= 7
    speeds = [row.plan.samples_per_s for row in found.best]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 1.5 * make_plan(pod4()).samples_per_s


def test_replicas_share_the_batch_and_may_share_the_moments():
    config = load_config([POD16])
    found = search(config)
    assert all(row.plan.work.samples == 128 for row in found.best)
    assert found.tried == 286 * 6 * 4
    assert all(row.layout.sharded for row in found.best), "as in the configuration, and no slower"
    alone = search(load_config([POD16], ["engine.replicated_tensor_sharding=false"]))
    assert not alone.best[0].layout.sharded
    assert alone.best[0].plan.fullest.memory.share > found.best[0].plan.fullest.memory.share


def test_a_stage_that_does_not_set_the_pace_takes_the_least_memory():
    best = search(pod4()).best[0]
    last = best.layout.recompute[-1]
    assert best.plan.by_speed()[0].stage != 3
    assert last != "stage_inputs", "quicker, but nobody waits for the last stage"


def test_a_written_layout_is_a_configuration_of_its_own(tmp_path):
    found = search(pod4()).best[0]
    path = tmp_path / "best.yaml"
    found.layout.write(path, on_ipus=True, comment=["how it came about"])
    config = check(load_config([POD4, path], ["engine.name=poptorch"]))
    assert config.pipeline.layers_per_stage == found.layout.layers_per_stage
    assert config.batch.global_batch_size is None
    assert make_plan(config).seconds == pytest.approx(found.plan.seconds)
    assert path.read_text().startswith("# how it came about\n")
    assert set(yaml.safe_load(path.read_text())) == {"pipeline", "batch", "engine"}


def test_a_file_is_never_written_over(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        search(pod4()).best[0].layout.write(path, on_ipus=True, comment=[])
    assert path.read_text() == "mine"


def test_processes_are_searched_by_their_own_rules():
    found = search(load_config([ROOT / "configs" / "vit_gpu4.yaml"]))
    assert list(found.refused) == [1, 2]
    assert all(row.layout.on_chip and not row.layout.sharded for row in found.best)
    assert "engine" not in found.best[0].layout.overlay(on_ipus=False)


def test_one_device_has_nothing_to_search():
    with pytest.raises(ConfigError, match="nothing to search"):
        search(load_config([ROOT / "configs" / "vit_demo.yaml"]))


def test_what_poptorch_refuses_anyhow_is_told_at_once():
    with pytest.raises(ConfigError, match="eval_device_iterations=1"):
        search(pod4("batch.eval_device_iterations=1"))


def test_micro_batches_that_do_not_divide_are_a_mistake():
    with pytest.raises(ConfigError, match=r"none of the micro-batches \[3, 5\] divides the 128"):
        search(pod4(), micro_batches=[3, 5])
