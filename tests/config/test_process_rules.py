"""What torchrun's processes must be for a configuration: counts, schedules, words."""

import pytest

from cxr_vit.config import check, load_config
from cxr_vit.config.rules import check_processes
from cxr_vit.errors import ConfigError


def config_of(*overrides):
    sound = ["model.name=vit-micro", "pipeline.layers_per_stage=[1,1,1,1]", "engine.name=pipeline"]
    return check(load_config([], [*sound, "batch.gradient_accumulation=8", *overrides]))


def problem(*overrides, engine="pipeline", world=4):
    with pytest.raises(ConfigError) as caught:
        check_processes(config_of(*overrides), engine, world)
    return str(caught.value)


@pytest.mark.parametrize(("replicas", "world"), [(1, 4), (2, 8), (3, 12)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b"])
def test_as_many_processes_as_stages_times_replicas_pass(replicas, world, schedule):
    config = config_of(f"batch.replicas={replicas}", f"pipeline.schedule={schedule}")
    check_processes(config, "pipeline", world)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_another_number_is_refused_and_both_are_said(world):
    text = problem(world=world)
    assert "needs 4 processes = 4 stages x 1 replicas" in text
    assert f"there {'is' if world == 1 else 'are'} {world}." in text
    assert "torchrun --nproc-per-node 4, or" in text
    assert ("engine.name=torch" in text) == (world == 1)


def test_replicas_count_among_the_processes():
    assert "8 processes = 4 stages x 2 replicas" in problem("batch.replicas=2", world=4)


def test_interleaved_stages_may_share_a_process():
    config = config_of("pipeline.schedule=interleaved_1f1b", "batch.replicas=2")
    check_processes(config, "pipeline", 4)  # two processes of two stages each, twice
    text = problem("pipeline.schedule=interleaved_1f1b", world=3)
    assert (
        "4 processes = 4 stages x 1 replicas (or 2, several stages each), and there are 3" in text
    )


def test_without_interleaving_they_may_not():
    assert "(or" not in problem("pipeline.schedule=1f1b", world=2)


def test_one_stage_and_one_replica_are_the_torch_engine():
    assert "engine.name=torch" in problem("pipeline.layers_per_stage=[4]", world=1)


def test_1f1b_must_fill_its_stages():
    text = problem("batch.gradient_accumulation=3")
    assert "batch.gradient_accumulation=3 is less than the 4 stages" in text
    assert "Smallest legal value: 4" in text
    config = config_of("batch.gradient_accumulation=3", "pipeline.schedule=gpipe")
    check_processes(config, "pipeline", 4)


def test_the_global_batch_is_named_where_that_was_given():
    text = problem("batch.gradient_accumulation=null", "batch.global_batch_size=2")
    assert "batch.global_batch_size=2, an accumulation of 2, is less than" in text


@pytest.mark.parametrize(("count", "legal"), [(9, "8 or 10"), (13, "12 or 15")])
def test_interleaving_goes_round_the_processes(count, legal):
    overrides = ("pipeline.schedule=interleaved_1f1b", f"batch.gradient_accumulation={count}")
    assert f"Nearest legal values: {legal}." in problem(*overrides)
    for value in legal.split(" or "):
        config = config_of(overrides[0], f"batch.gradient_accumulation={value}")
        check_processes(config, "pipeline", 4)


@pytest.mark.parametrize(("replicas", "world"), [(1, 1), (4, 4), (4, 2), (6, 3)])
def test_the_torch_engine_deals_replicas_out(replicas, world):
    check_processes(config_of(f"batch.replicas={replicas}"), "torch", world)


def test_processes_without_a_replica_are_refused():
    text = problem("batch.replicas=2", engine="torch", world=4)
    assert "batch.replicas=2, but torchrun started 4 processes" in text
    assert "Set batch.replicas=4" in text and "--nproc-per-node 2" in text


def test_no_stage_in_the_middle_may_be_empty():
    with pytest.raises(ConfigError, match="leaves stage 1 without work"):
        config_of("pipeline.layers_per_stage=[2, 0, 2]")
    config_of("pipeline.layers_per_stage=[0, 4, 0]")


def test_lamb_is_poptorchs_own():
    with pytest.raises(ConfigError, match=r"engine\.name=pipeline has adamw and sgd"):
        config_of("optim.name=lamb")
