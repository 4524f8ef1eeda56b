from pathlib import Path
from typing import Callable, Iterator, List

import pytest

from cxr_vit.config import read_config
from cxr_vit.model.schedule import LearningRate

TUTORIAL = Path(__file__).parents[2] / "configs" / "recipes" / "tutorial.yaml"
#: Steps of Graphcore's tutorial: 3 epochs of 832.
TUTORIAL_STEPS = 2496


def rate(total_steps: int, *overrides: str) -> LearningRate:
    return LearningRate.from_config(read_config([], overrides), total_steps)


@pytest.fixture
def tutorial_rate() -> LearningRate:
    return LearningRate.from_config(read_config([TUTORIAL]), TUTORIAL_STEPS)


# The numbers of Graphcore's tutorial


@pytest.mark.parametrize(
    ("step", "logged"), [(50, 1.602564102564103e-05), (2450, 2.978228636022262e-07)]
)
def test_rate_equals_the_log_of_the_tutorial(tutorial_rate, step, logged):
    assert tutorial_rate.at(step) == pytest.approx(logged, rel=1e-12, abs=0)


def test_first_update_of_the_tutorial_has_rate_0(tutorial_rate):
    assert tutorial_rate.at(0) == 0


def test_peak_of_the_tutorial_is_at_the_end_of_the_warm_up(tutorial_rate):
    assert tutorial_rate.warmup_steps == 624
    assert tutorial_rate.at(624) == 2e-4
    assert max(tutorial_rate.at(step) for step in range(2497)) == 2e-4


# The learning rate


@pytest.mark.parametrize(("ratio", "steps"), [("0.25", 3), ("0.21", 3), ("0", 0), ("1", 10)])
def test_warm_up_ratio_is_rounded_up_to_steps(ratio, steps):
    assert rate(10, f"schedule.warmup_ratio={ratio}").warmup_steps == steps


def test_warm_up_steps_are_used_as_given():
    assert rate(10, "schedule.warmup_steps=4").warmup_steps == 4


def test_first_update_without_warm_up_has_the_peak_rate():
    assert rate(10, "optim.lr=0.5").at(0) == 0.5


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_rate_after_the_last_step_is_0(name):
    found = rate(10, f"schedule.name={name}")
    assert [found.at(step) for step in (10, 11, 100)] == [0, 0, 0]


def test_rate_does_not_depend_on_earlier_steps():
    backward = rate(20, "schedule.warmup_ratio=0.3")
    forward = rate(20, "schedule.warmup_ratio=0.3")
    descending = [backward.at(step) for step in reversed(range(20))]
    assert descending[::-1] == [forward.at(step) for step in range(20)]


# The floor, and the warm-up in epochs

MAE = ("optim.lr=1e-3", "schedule.min_lr=1e-5", "schedule.warmup_epochs=2", "train.epochs=6")


def test_cosine_with_a_floor_at_every_step():
    """MAE's lr_sched.py for 6 epochs of 2 steps, 2 of them warm-up, computed by hand.

    The fall is 0.00099 * 0.5 * (1 + cos(pi * k / 8)) for k from 0 to 8.
    """
    expected = [
        0, 0.00025, 0.0005, 0.00075,
        0.001, 0.000962320369, 0.000855017857, 0.000694428299, 0.000505,
        0.000315571701, 0.000154982143, 0.0000476796314, 0.00001, 0.00001,
    ]  # fmt: skip
    found = rate(12, *MAE)
    assert [found.at(step) for step in range(14)] == pytest.approx(expected, rel=1e-8)
    assert found.at(12) == 1e-5


def test_linear_with_a_floor_at_every_step():
    found = rate(12, *MAE, "schedule.name=linear", "schedule.min_lr=2e-4")
    expected = [0, 25, 50, 75, 100, 90, 80, 70, 60, 50, 40, 30, 20]
    assert [found.at(step) * 1e5 for step in range(13)] == pytest.approx(expected, rel=1e-12)


def test_warm_up_then_constant_at_every_step():
    """EVA-X: the peak is kept to the end."""
    found = rate(12, "optim.lr=1e-3", "schedule.warmup_epochs=2", "train.epochs=6",
                 "schedule.name=constant")  # fmt: skip
    expected = [0, 0.00025, 0.0005, 0.00075, *[0.001] * 9]
    assert [found.at(step) for step in range(13)] == pytest.approx(expected, rel=1e-12)


def test_floor_of_a_rate_for_256_images():
    """MAE's minimum is a rate, not a rate for 256 images."""
    overrides = ("optim.base_lr=1e-3", "batch.gradient_accumulation=64", "schedule.min_lr=1e-5")
    assert (rate(10, *overrides).at(0), rate(10, *overrides).at(10)) == (2.5e-4, 1e-5)


def test_warm_up_of_5_of_75_epochs_is_exact_at_any_steps_per_epoch():
    config = read_config([], ["train.epochs=75", "schedule.warmup_epochs=5"])
    for steps in range(1, 3000):
        assert LearningRate.from_config(config, 75 * steps).warmup_steps == 5 * steps


@pytest.mark.parametrize(
    ("warmup", "epochs", "total", "steps"),
    [("0.1", "0.3", 30, 10), ("0.7", "1", 10, 7), ("1e-4", "1e-3", 20, 2), ("1", "3", 10, 4),
     ("0", "3", 10, 0)],
)  # fmt: skip
def test_warm_up_epochs_are_decimals_and_rounded_up_to_steps(warmup, epochs, total, steps):
    overrides = (f"schedule.warmup_epochs={warmup}", f"train.epochs={epochs}")
    assert rate(total, *overrides).warmup_steps == steps


# Comparison with the schedules of transformers

PEAK = 2e-4


def rates_of(make: Callable[..., object], *arguments: int, steps: int) -> Iterator[float]:
    """Yield the rates of a scheduler of transformers in a training loop."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer, *arguments)
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def ours(name: str, warmup: int, total: int) -> List[float]:
    schedule = LearningRate(peak=PEAK, name=name, warmup_steps=warmup, total_steps=total)
    return [schedule.at(step) for step in range(total)]


LENGTHS = [(624, 2496), (0, 100), (1, 1), (7, 100), (100, 100), (30, 20)]


@pytest.mark.parametrize(("warmup", "total"), LENGTHS)
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_equals_transformers_at_every_step(name, warmup, total):
    from transformers import optimization

    make = getattr(optimization, f"get_{name}_schedule_with_warmup")
    theirs = list(rates_of(make, warmup, total, steps=total))
    assert ours(name, warmup, total) == pytest.approx(theirs, rel=1e-12, abs=1e-15 * PEAK)


@pytest.mark.parametrize(("warmup", "total"), LENGTHS)
def test_constant_equals_transformers_at_every_step(warmup, total):
    from transformers import optimization

    make = optimization.get_constant_schedule_with_warmup
    theirs = list(rates_of(make, warmup, steps=total))
    assert ours("constant", warmup, total) == pytest.approx(theirs, rel=1e-12, abs=0)
