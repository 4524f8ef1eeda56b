"""Which layers sit on which stage."""

import pytest

from cxr_vit.config.plans import StagePlan


def test_allocation_of_the_tutorials_split():
    expected = [("Embedding", 0)]
    expected += [(f"Encoder {layer}", layer // 3) for layer in range(12)]
    expected += [("Head", 3)]
    assert StagePlan.from_list([3, 3, 3, 3]).allocation() == expected


def test_uneven_split_keeps_the_order_of_the_layers():
    plan = StagePlan.from_list([1, 4, 2])
    assert [list(plan.layers(stage)) for stage in range(3)] == [[0], [1, 2, 3, 4], [5, 6]]


def test_stage_without_layers_may_hold_the_embedding_alone():
    plan = StagePlan.from_list([0, 2])
    assert plan.allocation() == [("Embedding", 0), ("Encoder 0", 1), ("Encoder 1", 1), ("Head", 1)]


def test_stage_without_layers_may_hold_the_head_alone():
    plan = StagePlan.from_list([2, 0])
    assert plan.allocation() == [("Embedding", 0), ("Encoder 0", 0), ("Encoder 1", 0), ("Head", 1)]


def test_stage_without_layers_in_the_middle_is_passed_over():
    plan = StagePlan.from_list([1, 0, 1])
    assert list(plan.layers(1)) == []
    assert plan.allocation() == [("Embedding", 0), ("Encoder 0", 0), ("Encoder 1", 2), ("Head", 2)]


def test_one_stage_holds_everything():
    plan = StagePlan.from_list([2])
    assert {stage for _, stage in plan.allocation()} == {0}
    assert plan.has_embedding(0) and plan.has_head(0)


@pytest.mark.parametrize("layers", [[3, 3, 3, 3], [12], [0, 5, 0, 7, 0]])
def test_every_layer_is_placed_once(layers):
    plan = StagePlan.from_list(layers)
    placed = [layer for stage in range(plan.num_stages) for layer in plan.layers(stage)]
    assert placed == list(range(12))
    assert sum(plan.layers_per_stage) == 12


def test_only_the_first_stage_takes_the_pixels():
    plan = StagePlan.from_list([1, 1, 1])
    assert [plan.has_embedding(stage) for stage in range(3)] == [True, False, False]


def test_only_the_last_stage_gives_the_logits():
    plan = StagePlan.from_list([1, 1, 1])
    assert [plan.has_head(stage) for stage in range(3)] == [False, False, True]


def test_description_has_a_line_a_part():
    lines = StagePlan.from_list([1, 1]).describe()
    assert [line.split() for line in lines] == [
        ["Embedding", "-->", "stage", "0"],
        ["Encoder", "0", "-->", "stage", "0"],
        ["Encoder", "1", "-->", "stage", "1"],
        ["Head", "-->", "stage", "1"],
    ]
