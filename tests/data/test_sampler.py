"""Samplers: the samples of each step, one endless stream without dropped samples."""

from __future__ import annotations

from typing import List

import numpy as np
import pytest

from cxr_vit.data.sampler import EvaluationSampler, TrainingSampler

# Steps of 4 of 10 images with seed 1337; a change reorders the samples of every run.
GOLDEN = {0: [7, 6, 3, 5], 2: [0, 1, 8, 5], 1000: [2, 7, 9, 4]}


def make(
    num_samples: int = 10,
    global_batch_size: int = 4,
    device_iterations: int = 1,
    seed: int = 1337,
    start_step: int = 0,
    total_steps: int = 15,
) -> TrainingSampler:
    return TrainingSampler(
        num_samples,
        global_batch_size=global_batch_size,
        device_iterations=device_iterations,
        seed=seed,
        start_step=start_step,
        total_steps=total_steps,
    )


def rows_of(sampler: TrainingSampler, step: int) -> np.ndarray:
    return sampler.draws(step) % sampler.num_samples


def stream(sampler: TrainingSampler) -> List[int]:
    return [draw % sampler.num_samples for batch in sampler for draw in batch]


@pytest.mark.parametrize("step", sorted(GOLDEN))
def test_rows_are_golden_for_a_fixed_seed(step: int) -> None:
    assert rows_of(make(), step).tolist() == GOLDEN[step]


def test_rows_of_a_step_do_not_depend_on_the_order_of_calls() -> None:
    forward, backward = make(), make()
    in_order = [rows_of(forward, step).tolist() for step in range(15)]
    reversed_order = [rows_of(backward, step).tolist() for step in reversed(range(15))]
    assert in_order == reversed_order[::-1]


def test_rows_of_a_step_do_not_depend_on_earlier_calls() -> None:
    served = make()
    stream(served)
    for step in (14, 0, 7):
        np.testing.assert_array_equal(rows_of(served, step), rows_of(make(), step))


def test_rows_do_not_depend_on_the_length_of_the_run() -> None:
    np.testing.assert_array_equal(rows_of(make(total_steps=15), 3), rows_of(make(total_steps=4), 3))


def test_rows_do_not_depend_on_numpys_global_generator() -> None:
    before = rows_of(make(), 3)
    np.random.seed(0)  # noqa: NPY002
    np.testing.assert_array_equal(rows_of(make(), 3), before)


def test_iterating_gives_the_draws_of_each_step() -> None:
    sampler = make()
    assert list(sampler) == [make().draws(step).tolist() for step in range(15)]


def test_a_draw_contains_its_epoch() -> None:
    draws = [draw for batch in make(10, 4, total_steps=15) for draw in batch]
    assert [draw // 10 for draw in draws] == [epoch for epoch in range(6) for _ in range(10)]


def test_draws_are_int64_and_a_batch_is_plain_integers() -> None:
    assert make().draws(0).dtype == np.int64
    assert {type(draw) for batch in make() for draw in batch} == {int}


def test_another_seed_gives_another_order() -> None:
    assert stream(make(100, 10, total_steps=10)) != stream(make(100, 10, seed=1, total_steps=10))


def test_another_epoch_has_another_order() -> None:
    rows = stream(make(100, 10, total_steps=20))
    assert rows[:100] != rows[100:]


def test_an_epoch_holds_every_sample_once() -> None:
    assert sorted(stream(make(12, 4, total_steps=3))) == list(range(12))


def test_no_sample_is_dropped_if_a_batch_spans_two_epochs() -> None:
    rows = stream(make(10, 4, total_steps=15))  # 60 rows: six epochs, most ending inside a batch
    epochs = [sorted(rows[start : start + 10]) for start in range(0, 60, 10)]
    assert epochs == [list(range(10))] * 6


def test_a_global_batch_may_be_larger_than_the_split() -> None:
    rows = stream(make(3, 8, total_steps=3))
    assert [sorted(rows[start : start + 3]) for start in range(0, 24, 3)] == [[0, 1, 2]] * 8


def test_a_split_of_one_image_is_repeated() -> None:
    assert stream(make(1, 2, total_steps=2)) == [0, 0, 0, 0]


@pytest.mark.parametrize("start_step", [1, 3, 7, 14])
def test_a_later_start_continues_the_same_stream(start_step: int) -> None:
    assert stream(make(start_step=start_step)) == stream(make())[start_step * 4 :]


@pytest.mark.parametrize("device_iterations", [2, 3, 4, 20])
def test_device_iterations_only_group_the_stream(device_iterations: int) -> None:
    assert stream(make(device_iterations=device_iterations)) == stream(make())


def test_a_host_batch_holds_the_samples_of_its_steps() -> None:
    assert [len(batch) for batch in make(device_iterations=4)] == [16, 16, 16, 12]


@pytest.mark.parametrize("device_iterations", [1, 2, 4, 20])
@pytest.mark.parametrize("start_step", [0, 6, 15])
def test_the_length_is_the_number_of_host_batches(device_iterations: int, start_step: int) -> None:
    sampler = make(device_iterations=device_iterations, start_step=start_step)
    assert len(sampler) == len(list(sampler))


def test_a_finished_run_yields_nothing() -> None:
    assert list(make(start_step=15)) == []


def test_a_second_pass_repeats_the_first() -> None:
    sampler = make()
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1), (0, 4)])
def test_evaluation_covers_every_row_once_in_order(num_samples: int, batch_size: int) -> None:
    batches = list(EvaluationSampler(num_samples, batch_size=batch_size))
    assert [row for batch in batches for row in batch] == list(range(num_samples))


def test_only_the_last_batch_of_an_evaluation_is_shorter() -> None:
    assert list(map(len, EvaluationSampler(10, batch_size=4))) == [4, 4, 2]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "batches"), [(10, 4, 3), (8, 4, 2), (3, 8, 1), (0, 4, 0)]
)
def test_evaluation_length_is_its_number_of_batches(
    num_samples: int, batch_size: int, batches: int
) -> None:
    sampler = EvaluationSampler(num_samples, batch_size=batch_size)
    assert len(sampler) == batches == len(list(sampler))
