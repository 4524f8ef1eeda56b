from pathlib import Path

import pytest

from cxr_vit.config import BatchPlan, read_config
from cxr_vit.training.durations import Durations

TUTORIAL = Path(__file__).parents[2] / "configs" / "recipes" / "tutorial.yaml"


def durations(num_samples: int, *overrides: str) -> Durations:
    config = read_config([], overrides)
    return Durations.from_section(config.train, BatchPlan.from_section(config.batch), num_samples)


@pytest.fixture
def tutorial() -> Durations:
    config = read_config([TUTORIAL])
    return Durations.from_section(config.train, BatchPlan.from_section(config.batch), 106_514)


# The numbers of Graphcore's tutorial


def test_tutorial_has_832_steps_per_epoch(tutorial):
    assert tutorial.steps_per_epoch == 832


def test_tutorial_has_2496_steps(tutorial):
    assert tutorial.total_steps == 2496


def test_tutorial_saves_every_1000_steps(tutorial):
    assert tutorial.checkpoint_every == 1000


def test_tutorial_validates_every_epoch(tutorial):
    assert tutorial.eval_every == 832


# Durations


def test_epoch_is_the_number_of_whole_batches_in_the_samples():
    assert durations(99, "batch.global_batch_size=10").steps_per_epoch == 9
    assert durations(100, "batch.global_batch_size=10").steps_per_epoch == 10


def test_epoch_has_at_least_one_step():
    found = durations(3, "batch.global_batch_size=10", "train.epochs=4")
    assert (found.steps_per_epoch, found.total_steps) == (1, 4)


def test_steps_are_used_as_given():
    found = durations(
        100,
        "train.steps=7",
        "train.eval_every_steps=2",
        "train.checkpoint_every_steps=3",
    )
    assert (found.total_steps, found.eval_every, found.checkpoint_every) == (7, 2, 3)


def test_fraction_of_an_epoch_is_rounded_to_steps():
    found = durations(
        100,
        "train.epochs=0.5",
        "train.eval_every_epochs=0.251",
        "train.checkpoint_every_epochs=0.257",
    )
    assert (found.total_steps, found.eval_every, found.checkpoint_every) == (50, 25, 26)


def test_no_duration_is_0():
    found = durations(
        100,
        "train.epochs=0.001",
        "train.eval_every_epochs=0.001",
        "train.checkpoint_every_epochs=0.001",
    )
    assert (found.total_steps, found.eval_every, found.checkpoint_every) == (1, 1, 1)


def test_run_is_a_whole_number_of_host_calls():
    found = durations(100, "train.epochs=1", "batch.device_iterations=8")
    assert found.total_steps == 96


def test_run_is_at_least_one_host_call():
    found = durations(3, "train.epochs=1", "batch.device_iterations=8")
    assert found.total_steps == 8


def test_description_has_the_numbers():
    text = Durations(832, 2496, 416, 1000).describe()
    assert text == ("2496 steps, 832 per epoch; validation every 416, checkpoint every 1000 steps")


def test_description_of_a_resumed_run_names_the_first_step():
    assert Durations(832, 2496, 416, 1000).describe(50).startswith("from step 50 on, 2496 steps")
