"""Batch arithmetic and allocation of layers to stages."""

import pytest

from cxr_vit.config import BatchPlan, StagePlan, check, load_config, read_config
from cxr_vit.config.plans import empty_stage_problem, fill_rest
from cxr_vit.errors import ConfigError


def batch_plan(*overrides: str) -> BatchPlan:
    return BatchPlan.from_section(read_config([], [f"batch.{text}" for text in overrides]).batch)


def test_global_batch_is_a_product():
    batch = batch_plan("micro_batch_size=2", "gradient_accumulation=3", "replicas=5")
    assert batch.global_batch_size == 30


def test_host_batch_includes_device_iterations():
    batch = batch_plan("micro_batch_size=2", "gradient_accumulation=3", "device_iterations=7")
    assert (batch.global_batch_size, batch.host_batch_size) == (6, 42)


def test_evaluation_host_batch_ignores_accumulation():
    batch = batch_plan(
        "eval_micro_batch_size=3",
        "eval_device_iterations=4",
        "replicas=5",
        "gradient_accumulation=7",
        "device_iterations=11",
    )
    assert batch.eval_host_batch_size == 60


def test_accumulation_follows_from_the_global_batch():
    batch = batch_plan("micro_batch_size=2", "replicas=4", "global_batch_size=128")
    assert batch.gradient_accumulation == 16
    assert batch.global_batch_size == 128


def test_description_contains_the_numbers():
    text = "\n".join(
        batch_plan(
            "micro_batch_size=2",
            "gradient_accumulation=3",
            "replicas=5",
            "device_iterations=7",
            "eval_micro_batch_size=11",
            "eval_device_iterations=13",
        ).describe()
    )
    assert "30 samples per weight update = 2 micro-batch x 3 accumulation x 5 replicas" in text
    assert "210 samples per host call = 30 global batch x 7 device iterations" in text
    assert "715 samples per host call = 11 micro-batch x 5 replicas x 13 device iterations" in text


@pytest.mark.parametrize(
    ("overrides", "legal"),
    [
        (["micro_batch_size=4", "global_batch_size=30"], "28 or 32"),
        (["micro_batch_size=4", "replicas=3", "global_batch_size=30"], "24 or 36"),
        (["micro_batch_size=8", "global_batch_size=3"], "8"),
    ],
)
def test_invalid_global_batch_names_the_nearest_legal_values(overrides, legal):
    with pytest.raises(ConfigError) as caught:
        load_config([], [f"batch.{text}" for text in overrides])
    assert f"Nearest legal values: {legal}." in str(caught.value)


@pytest.mark.parametrize("overrides", [["micro_batch_size=4", "global_batch_size=32"], []])
def test_valid_global_batch_passes(overrides):
    config = read_config([], [f"batch.{text}" for text in overrides])
    assert check(config) is config


# Stages


def test_allocation_of_four_equal_stages():
    expected = [("Embedding", 0)]
    expected += [(f"Encoder {layer}", layer // 3) for layer in range(12)]
    expected += [("Head", 3)]
    assert StagePlan.from_list([3, 3, 3, 3]).allocation() == expected


def test_uneven_stages_keep_the_layer_order():
    plan = StagePlan.from_list([1, 4, 2])
    assert [list(plan.layers(stage)) for stage in range(3)] == [[0], [1, 2, 3, 4], [5, 6]]


def test_first_stage_may_have_only_the_embedding():
    plan = StagePlan.from_list([0, 2])
    assert plan.allocation() == [("Embedding", 0), ("Encoder 0", 1), ("Encoder 1", 1), ("Head", 1)]


def test_last_stage_may_have_only_the_head():
    plan = StagePlan.from_list([2, 0])
    assert plan.allocation() == [("Embedding", 0), ("Encoder 0", 0), ("Encoder 1", 0), ("Head", 1)]


def test_inner_stage_without_layers_has_no_part():
    plan = StagePlan.from_list([1, 0, 1])
    assert list(plan.layers(1)) == []
    assert plan.allocation() == [("Embedding", 0), ("Encoder 0", 0), ("Encoder 1", 2), ("Head", 2)]


def test_single_stage_has_all_parts():
    plan = StagePlan.from_list([2])
    assert {stage for _, stage in plan.allocation()} == {0}
    assert plan.has_embedding(0) and plan.has_head(0)


@pytest.mark.parametrize("layers", [[3, 3, 3, 3], [12], [0, 5, 0, 7, 0]])
def test_every_layer_is_placed_once(layers):
    plan = StagePlan.from_list(layers)
    placed = [layer for stage in range(plan.num_stages) for layer in plan.layers(stage)]
    assert placed == list(range(12))
    assert sum(plan.layers_per_stage) == 12


def test_only_the_first_stage_has_the_embedding():
    plan = StagePlan.from_list([1, 1, 1])
    assert [plan.has_embedding(stage) for stage in range(3)] == [True, False, False]


def test_only_the_last_stage_has_the_head():
    plan = StagePlan.from_list([1, 1, 1])
    assert [plan.has_head(stage) for stage in range(3)] == [False, False, True]


def test_description_has_one_line_per_part():
    lines = StagePlan.from_list([1, 1]).describe()
    assert [line.split() for line in lines] == [
        ["Embedding", "-->", "stage", "0"],
        ["Encoder", "0", "-->", "stage", "0"],
        ["Encoder", "1", "-->", "stage", "1"],
        ["Head", "-->", "stage", "1"],
    ]


@pytest.mark.parametrize(
    ("layers", "empty"), [([1, 0, 1], 1), ([0, 1, 0, 0], 2), ([0, 2, 0], None), ([0], None)]
)
def test_only_inner_stages_need_layers(layers, empty):
    assert StagePlan.from_list(layers).empty_stage == empty
    problem = empty_stage_problem(layers, place="IPU")
    if empty is None:
        assert problem is None
    else:
        assert problem.given == f"pipeline.layers_per_stage={layers}"
        assert problem.rule == f"leaves IPU {empty} without work."


@pytest.mark.parametrize(
    ("recompute", "kept"),
    [
        ("every_layer", [([0], []), ([1, 2], [])]),
        ("stage_inputs", [([], []), ([], [])]),
        ("none", None),
        (None, [([0], []), ([1, 2], [])]),
        ("attention_mlp", [([0], [0]), ([1, 2], [1, 2])]),
        (["stage_inputs", [2]], [([], []), ([2], [])]),
        (["attention_mlp", "every_layer"], [([0], [0]), ([1, 2], [])]),
    ],
)
def test_kept_outputs(recompute, kept):
    plan = StagePlan.from_list([1, 2])
    assert plan.kept_outputs(recompute, on_ipus=True) == kept
    elsewhere = None if recompute is None else kept
    assert plan.kept_outputs(recompute, on_ipus=False) == elsewhere


@pytest.mark.parametrize(
    ("given", "depth", "filled"),
    [
        ([3, 3, 3, 3], 12, [3, 3, 3, 3]),
        ([2, -1, -1, 2], 12, [2, 4, 4, 2]),
        ([-1], 12, [12]),
        ([-1, -1, -1, -1], 9, [2, 2, 2, 3]),
        ([-1, 4, -1], 9, [2, 4, 3]),
        ([0, -1], 12, [0, 12]),
        ([10, -1, 2], 12, [10, 0, 2]),
        ([10, -1, 5], 12, [10, 0, 5]),
    ],
)
def test_rest_of_the_layers(given, depth, filled):
    """As optimum-graphcore divides them: evenly, the last with the remainder."""
    assert fill_rest(given, depth) == filled
