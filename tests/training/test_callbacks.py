import dataclasses
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from cxr_vit.engines.base import StepOutput
from cxr_vit.errors import NonFiniteLoss
from cxr_vit.training.callbacks import EarlyStopping, NonFiniteGuard, ProgressDisplay
from cxr_vit.training.trainer import EvalEnd, StepEnd


def step_end(losses, *, first_step=0):
    output = StepOutput(torch.tensor(losses), None, 2 * len(losses))
    return StepEnd(first_step, first_step + len(losses), output, 1e-3, 0.0, 1.0)


def eval_end(score, step=1):
    scores = {"auroc_macro": score, "auroc_defined": 13, "num_findings": 14}
    empty = torch.zeros(2, 1)
    return EvalEnd(step, 0.1, scores, empty, empty, 1.0)


class FakeTrainer:
    """Records what a callback requests."""

    step = 0
    durations = SimpleNamespace(total_steps=4)
    checkpoints = SimpleNamespace(linked=lambda name: None)
    train_data = SimpleNamespace(image_names=[f"{row:08d}_000.png" for row in range(10)])

    def __init__(self):
        self.reasons = []

    def rows(self, step):
        return {11: [0, 1], 41: [1, 2], 42: [7, 8]}[step]

    def is_due(self, first_step, every):
        return self.step % every == 0

    def request_stop(self, reason):
        self.reasons.append(reason)


# NonFiniteGuard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_names_the_step_and_its_images(bad):
    event = step_end([0.5, bad], first_step=41)
    with pytest.raises(
        NonFiniteLoss, match=r"at step 42 .*00000007_000\.png, 00000008_000\.png"
    ) as caught:
        NonFiniteGuard().on_step_end(FakeTrainer(), event)
    assert "00000001_000.png" not in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_is_reported_although_the_loss_is_finite(bad):
    event = step_end([0.5, 0.4], first_step=10)
    output = event.output._replace(grad_norm=torch.tensor([1.0, bad]))
    event = dataclasses.replace(event, output=output)
    with pytest.raises(NonFiniteLoss, match=r"gradient norm is .* at step 11"):
        NonFiniteGuard().on_step_end(FakeTrainer(), event)


def test_finite_loss_passes():
    NonFiniteGuard().on_step_end(FakeTrainer(), step_end([0.5, 0.1]))


# EarlyStopping


def test_early_stopping_waits_for_its_patience():
    stopping, trainer = EarlyStopping(2), FakeTrainer()
    for score in (0.5, 0.6, 0.59, 0.7, 0.7):
        stopping.on_eval_end(trainer, eval_end(score))
    assert trainer.reasons == []
    stopping.on_eval_end(trainer, eval_end(0.69))
    assert len(trainer.reasons) == 1
    assert "2 validations" in trainer.reasons[0]
    assert "0.7000" in trainer.reasons[0]


def test_early_stopping_without_patience_never_stops():
    stopping, trainer = EarlyStopping(None), FakeTrainer()
    for _ in range(20):
        stopping.on_eval_end(trainer, eval_end(0.5))
    assert trainer.reasons == []


def test_undefined_score_counts_as_no_improvement():
    stopping, trainer = EarlyStopping(1), FakeTrainer()
    stopping.on_eval_end(trainer, eval_end(None))
    assert len(trainer.reasons) == 1


def test_early_stopping_continues_after_a_resume():
    before, after, trainer = EarlyStopping(2), EarlyStopping(2), FakeTrainer()
    before.on_eval_end(trainer, eval_end(0.8))
    before.on_eval_end(trainer, eval_end(0.7))
    after.load_state_dict(before.state_dict())
    after.on_eval_end(trainer, eval_end(0.75))
    assert len(trainer.reasons) == 1


def test_state_before_the_first_score_is_valid_json():
    stopping = EarlyStopping(2)
    stopping.load_state_dict(json.loads(json.dumps(EarlyStopping(2).state_dict())))
    assert stopping.best == -math.inf


# ProgressDisplay


def displayed(console, steps=4):
    display, trainer = ProgressDisplay(every=2, console=console), FakeTrainer()
    display.on_fit_start(trainer)
    for first in range(steps):
        trainer.step = first + 1
        display.on_step_end(trainer, step_end([0.5], first_step=first))
    display.on_eval_end(trainer, eval_end(0.5, step=4))
    display.on_fit_end(trainer)
    return console.file.getvalue()


def test_output_without_a_terminal_is_plain_lines():
    text = displayed(Console(file=io.StringIO(), force_terminal=False))
    lines = text.splitlines()
    assert lines[0].startswith("step 2/4  loss 0.5000  lr 1.00e-03  2 samples/s")
    assert "eta 0:00:0" in lines[0]
    assert len(lines) == 3
    assert "macro AUROC 0.5000 (13 of 14 findings)" in lines[2]
    assert "\x1b" not in text


def test_output_on_a_terminal_is_a_bar():
    text = displayed(Console(file=io.StringIO(), force_terminal=True, width=160))
    assert "\x1b" in text
    for part in ("4/4", "loss 0.5000", "samples/s", "eta"):
        assert part in text
