"""PopART's AdamW as benchmarks/ipu_fp16_optimizer.py emulates it."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.ipu_fp16_optimizer import (
    CASES,
    HEADER,
    SMALLEST,
    EmulatedAdamW,
    Precision,
    Rounding,
    table_row,
)

ROOT = Path(__file__).resolve().parents[2]

FP32 = Precision(loss_scaling=1.0, stochastic_rounding=False)
BETAS = (0.9, 0.999)


def optimizer(precision: Precision, weights: torch.Tensor, decay: float = 0.0) -> EmulatedAdamW:
    return EmulatedAdamW(weights, torch.full_like(weights, decay), precision, Rounding(None), BETAS)


def first_change(precision: Precision, gradient: float) -> float:
    """Return the first update of a weight, before the learning rate, at a constant gradient."""
    emulated = optimizer(precision, torch.zeros(1))
    for _ in range(8):
        emulated.accumulate(torch.tensor([gradient * precision.loss_scaling]).half().float())
    return float(emulated.update(1e-3))


@pytest.mark.parametrize("loss_scaling", [1.0, 1024.0])
def test_in_fp32_it_is_torchs_adamw(loss_scaling):
    torch.manual_seed(0)
    start = torch.randn(1000)
    expected = torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([expected], lr=1e-2, betas=BETAS, weight_decay=0.05)
    emulated = optimizer(FP32._replace(loss_scaling=loss_scaling), start, decay=0.05)
    for _ in range(20):
        gradients = torch.randn(4, 1000)
        for gradient in gradients:
            emulated.accumulate(gradient * loss_scaling)
        emulated.update(1e-2)
        expected.grad = gradients.mean(0)
        reference.step()
    torch.testing.assert_close(emulated.weights, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("gradient", "eps", "is_finite"),
    [
        (5.5e-3, 1e-8, False),
        (5.6e-3, 1e-8, True),  # (1 - beta2) * gradient^2 reaches half of fp16's smallest number
        (3e-3, 2**-25, False),  # rounds to 0
        (3e-3, 1.01 * 2**-25, True),
        (5.5e-3, 1.49 * SMALLEST, False),  # not divided by 0, but beyond fp16's 65504
        (5.5e-3, 1.5 * SMALLEST, True),
    ],
)
def test_fp16_second_moment_needs_an_eps_that_fp16_holds(gradient, eps, is_finite):
    change = first_change(FP32._replace(second_moment="fp16", eps=eps), gradient)
    assert math.isfinite(change) is is_finite


@pytest.mark.parametrize("eps", [6e-8, 1e-6, 1e-4])
def test_fp16_second_moment_divides_small_gradients_by_eps(eps):
    """Where AdamW's first update is 1, it is the gradient by eps: thousands at the least eps."""
    change = first_change(FP32._replace(second_moment="fp16", eps=eps), 1e-3)
    assert change == pytest.approx(1e-3 / max(eps, SMALLEST), rel=0.02)
    assert first_change(FP32._replace(eps=eps), 1e-3) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("accumulator", "first_moment", "survives"),
    [
        ("fp32", "fp32", True),
        ("fp16", "fp32", True),
        ("fp32", "fp16", False),
        ("fp16", "fp16", False),
    ],
)
def test_loss_scaling_protects_small_gradients_up_to_the_first_fp16_number(
    accumulator, first_moment, survives
):
    """2^-26 is 0 in fp16, and 2^-16 at a loss scaling of 1024 is not."""
    precision = Precision("fp32", accumulator, first_moment, stochastic_rounding=False)
    assert (first_change(precision, 2.0**-26) != 0.0) is survives
    emulated = optimizer(precision, torch.zeros(1))
    emulated.accumulate(torch.tensor([2.0**-16]))
    second_moment_survives = float(emulated.unscaled()) != 0.0
    assert second_moment_survives is (survives or accumulator == "fp32")


def test_stochastic_rounding_keeps_the_mean_and_every_fp16_number():
    to = Rounding(torch.Generator().manual_seed(0))("fp16")
    for value in (1e-8, 3e-5, 0.0123, -1.0 - 2.0**-12):
        rounded = to(torch.full((2**18,), value))
        assert len(rounded.unique()) == 2
        assert float(rounded.double().mean()) == pytest.approx(value, rel=0.02)
    numbers = torch.arange(-(2**15), 2**15 - 1, dtype=torch.int16).view(torch.half).float()
    numbers = numbers[~numbers.isnan()]
    assert torch.equal(to(numbers), numbers)


def test_small_updates_of_fp16_weights_survive_only_stochastic_rounding():
    """An update of 1e-4 is a fifth of half the step between fp16's numbers around 1."""
    changes = {}
    for generator in (None, torch.Generator().manual_seed(0)):
        emulated = optimizer(FP32._replace(weights="fp16"), torch.ones(1000))
        emulated.rounding = Rounding(generator)
        for _ in range(10):
            emulated.accumulate(torch.ones(1000))
            emulated.update(1e-4)
        changes[generator is None] = 1.0 - float(emulated.weights.mean())
    assert changes[True] == 0.0
    assert changes[False] == pytest.approx(1e-3, rel=0.2)


def test_precision_page_has_the_table_of_the_results():
    path = ROOT / "benchmarks" / "results" / "ipu_fp16_optimizer.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]["rows"]
    assert [
        (row["case"], Precision(*(row[key] for key in Precision._fields)), row["lr"])
        for row in rows
    ] == list(map(tuple, CASES))
    page = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    table = "\n".join([HEADER, *map(table_row, rows)])
    assert table in page
