import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from cxr_vit.engines.base import StepOutput
from cxr_vit.errors import NonFiniteLoss
from cxr_vit.training.trainer import (
    Checkpointing,
    EarlyStopping,
    EvalEnd,
    NonFiniteGuard,
    StepEnd,
)


def step_end(losses, *, first_step=0):
    output = StepOutput(torch.tensor(losses), None, 2 * len(losses))
    return StepEnd(first_step, first_step + len(losses), output, 1e-3, 0.0, 1.0)


def eval_end(score, step=1):
    empty = torch.zeros(0, 1)
    return EvalEnd(step, 0.1, {"auroc_macro": score}, empty, empty, 1.0)


class FakeTrainer:
    """Records what a callback asks for."""

    def __init__(self):
        self.store = SimpleNamespace(linked=lambda name: None)
        self.reasons = []

    def rows(self, step):
        return {11: [0, 1], 41: [1, 2], 42: [7, 8]}[step]

    def request_stop(self, reason):
        self.reasons.append(reason)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_names_the_step_and_its_images(bad):
    guard = NonFiniteGuard([f"{row:08d}_000.png" for row in range(10)])
    event = step_end([0.5, bad], first_step=41)
    with pytest.raises(
        NonFiniteLoss, match=r"at step 42 .*00000007_000\.png, 00000008_000\.png"
    ) as caught:
        guard.on_step_end(FakeTrainer(), event)
    assert "00000001_000.png" not in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_is_told_though_the_loss_is_finite(bad):
    event = step_end([0.5, 0.4], first_step=10)
    output = event.output._replace(grad_norm=torch.tensor([1.0, bad]))
    event = dataclasses.replace(event, output=output)
    with pytest.raises(NonFiniteLoss, match=r"gradient norm is .* at step 11"):
        NonFiniteGuard(["a", "b", "c", "d"]).on_step_end(FakeTrainer(), event)


def test_a_finite_loss_passes():
    NonFiniteGuard([]).on_step_end(FakeTrainer(), step_end([0.5, 0.1]))


def test_early_stopping_waits_for_its_patience():
    stopping, trainer = EarlyStopping(2), FakeTrainer()
    for score in (0.5, 0.6, 0.59, 0.7, 0.7):
        stopping.on_eval_end(trainer, eval_end(score))
    assert trainer.reasons == []
    stopping.on_eval_end(trainer, eval_end(0.69))
    assert len(trainer.reasons) == 1
    assert "2 validations" in trainer.reasons[0]
    assert "0.7000" in trainer.reasons[0]


def test_without_patience_nothing_stops():
    stopping, trainer = EarlyStopping(None), FakeTrainer()
    for _ in range(20):
        stopping.on_eval_end(trainer, eval_end(0.5))
    assert trainer.reasons == []


def test_an_undefined_score_counts_as_no_improvement():
    stopping, trainer = EarlyStopping(1), FakeTrainer()
    stopping.on_eval_end(trainer, eval_end(None))
    assert len(trainer.reasons) == 1


def test_early_stopping_goes_on_after_a_resume():
    before, after, trainer = EarlyStopping(2), EarlyStopping(2), FakeTrainer()
    before.on_eval_end(trainer, eval_end(0.8))
    before.on_eval_end(trainer, eval_end(0.7))
    after.load_state_dict(before.state_dict())
    after.on_eval_end(trainer, eval_end(0.75))
    assert len(trainer.reasons) == 1


def test_a_fresh_early_stopping_survives_json():

    stopping = EarlyStopping(2)
    stopping.load_state_dict(json.loads(json.dumps(EarlyStopping(2).state_dict())))
    assert stopping.best == -math.inf


def test_the_best_score_is_remembered():
    saver = Checkpointing(every=5, keep_last=1)
    saver.load_state_dict({"best": 0.75})
    assert saver.state_dict() == {"best": 0.75}
