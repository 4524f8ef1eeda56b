import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from cxr_vit.engines.base import StepOutput
from cxr_vit.errors import ConfigError
from cxr_vit.evaluation.metrics import EvalOutputs
from cxr_vit.training.callback import Callback, TrainOutputs
from cxr_vit.training.callbacks import (
    EarlyStopping,
    ProgressDisplay,
    default_callbacks,
)


def outputs(losses, *, first_step=0, grad_norm=None):
    step = first_step + len(losses)
    count = 2 * len(losses)
    output = StepOutput(torch.tensor(losses), grad_norm, count)
    return TrainOutputs(first_step, step, output, 1e-3, 0.0, 1.0)


def scored(score, step=1):
    scores = {"auroc_macro": score, "auroc_defined": 13, "num_findings": 14}
    empty = torch.zeros(2, 1)
    return EvalOutputs("val", step, 0.1, scores, empty, empty, 1.0)


class FakeTrainer:
    """Records what a callback requests."""

    global_step = 0
    is_fitting = True
    durations = SimpleNamespace(total_steps=4)
    checkpoints = SimpleNamespace(linked=lambda name: None)
    train_data = SimpleNamespace(image_names=[f"{row:08d}_000.png" for row in range(10)])

    def __init__(self):
        self.reasons = []
        self.callback_metrics = {}

    def validated(self, result, *callbacks):
        """Call the hook as after a validation."""
        self.validation_outputs = result
        self.callback_metrics.update(result.tagged())
        for callback in callbacks:
            callback.on_validation_end(self, None)

    def rows(self, step):
        return {11: [0, 1], 41: [1, 2], 42: [7, 8]}[step]

    def is_due(self, first_step, every):
        return self.global_step % every == 0

    def request_stop(self, reason):
        self.reasons.append(reason)


# EarlyStopping


def test_early_stopping_waits_for_its_patience():
    stopping, trainer = EarlyStopping(patience=2), FakeTrainer()
    for score in (0.5, 0.6, 0.59, 0.7, 0.7):
        trainer.validated(scored(score), stopping)
    assert trainer.reasons == []
    trainer.validated(scored(0.69), stopping)
    assert len(trainer.reasons) == 1
    assert "2 validations" in trainer.reasons[0]
    assert "0.7000" in trainer.reasons[0]


def test_early_stopping_without_patience_never_stops():
    stopping, trainer = EarlyStopping(patience=None), FakeTrainer()
    for _ in range(20):
        trainer.validated(scored(0.5), stopping)
    assert trainer.reasons == []


@pytest.mark.parametrize("undefined", [None, float("nan"), float("inf")])
def test_validations_of_an_undefined_score_do_not_count(undefined, caplog):
    stopping, trainer = EarlyStopping(patience=2), FakeTrainer()
    for _ in range(5):
        trainer.validated(scored(undefined), stopping)
    assert (stopping.best, trainer.reasons) == (None, [])
    for score in (0.8, 0.7, undefined, undefined):
        trainer.validated(scored(score), stopping)
    assert (stopping.since_best, trainer.reasons) == (1, [])
    trainer.validated(scored(0.8), stopping)
    assert trainer.reasons[0].endswith("without a better val/auroc_macro than 0.8000")
    assert caplog.messages == [
        "val/auroc_macro is undefined: no label has both positive and negative images in the"
        " validation split. Such validations do not count for early stopping"
    ]


def test_early_stopping_continues_after_a_resume():
    before, after, trainer = EarlyStopping(patience=2), EarlyStopping(patience=2), FakeTrainer()
    trainer.validated(scored(0.8), before)
    trainer.validated(scored(0.7), before)
    after.load_state_dict(before.state_dict())
    trainer.validated(scored(0.75), after)
    assert len(trainer.reasons) == 1


def test_state_before_the_first_score_is_valid_json():
    stopping = EarlyStopping(patience=2)
    stopping.load_state_dict(json.loads(json.dumps(EarlyStopping(patience=2).state_dict())))
    assert stopping.best is None


def test_any_metric_can_be_monitored():
    stopping, trainer = EarlyStopping(patience=1, monitor="val/loss", mode="min"), FakeTrainer()
    trainer.validated(scored(0.5), stopping)
    assert (stopping.best, trainer.reasons) == (0.1, [])
    trainer.validated(scored(0.9), stopping)
    assert trainer.reasons == [
        "early stopping: 1 validations without a better val/loss than 0.1000"
    ]


def test_unknown_metric_is_refused_with_those_there_are():
    trainer = FakeTrainer()
    with pytest.raises(
        ConfigError, match=r"no metric 'val/f1'\. There are: val/auroc_macro, .*loss"
    ):
        trainer.validated(scored(0.5), EarlyStopping(patience=1, monitor="val/f1"))


def test_metric_that_stops_nothing_may_be_absent():
    """The built-in callback without patience, and a module with other metrics."""
    stopping, trainer = EarlyStopping(patience=None), FakeTrainer()
    trainer.validated(EvalOutputs("val", 1, 0.1, {"f1": 0.5}, None, None, 1.0), stopping)
    assert trainer.reasons == []


def test_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="mode='best' must be 'max' or 'min'"):
        EarlyStopping(patience=1, mode="best")


def test_a_loss_is_minimised_unless_said_otherwise():
    assert (EarlyStopping("val/loss").sign, EarlyStopping().sign) == (-1.0, 1.0)
    assert EarlyStopping("val/loss", mode="max").sign == 1.0


def test_method_that_is_no_hook_is_refused():
    with pytest.raises(ConfigError, match=r"Mine\.on_train_batch_ends is no hook.*batch_end'"):
        type("Mine", (Callback,), {"on_train_batch_ends": lambda self: None})


def test_validation_outside_a_fit_is_not_counted():
    stopping, trainer = EarlyStopping(patience=1), FakeTrainer()
    trainer.is_fitting = False
    trainer.validated(scored(0.5), stopping)
    trainer.validated(scored(0.4), stopping)
    assert (stopping.best, trainer.reasons) == (None, [])


# ProgressDisplay


def displayed(console, steps=4):
    display, trainer = ProgressDisplay(every=2, console=console), FakeTrainer()
    display.on_fit_start(trainer, None)
    for first in range(steps):
        trainer.global_step = first + 1
        display.on_train_batch_end(trainer, None, outputs([0.5], first_step=first), None, first)
    trainer.validated(scored(0.5, step=4), display)
    display.on_fit_end(trainer, None)
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


def test_scores_of_other_metrics_are_displayed():
    console = Console(file=io.StringIO())
    trainer = FakeTrainer()
    result = EvalOutputs("val", 3, 0.1, {"f1": 0.5}, torch.zeros(2, 1), None, 1.0)
    trainer.validated(result, ProgressDisplay(every=2, console=console))
    assert console.file.getvalue().startswith("step 3  val loss 0.1000  auroc_macro undefined")


# default_callbacks


@pytest.fixture
def names(make_config):
    def of(*given, is_main, **engine):
        config = make_config().changed(engine=engine)
        return [type(one).__name__ for one in default_callbacks(config, given, is_main=is_main)]

    return of


def test_process_that_writes_displays_and_logs(names):
    assert names(is_main=True) == [
        "NonFiniteGuard",
        "EarlyStopping",
        "MetricsLogging",
        "FigureLogging",
        "ProgressDisplay",
    ]


def test_other_process_neither_displays_nor_draws(names):
    assert names(is_main=False) == ["NonFiniteGuard", "EarlyStopping", "MetricsLogging"]


def test_losses_of_synthetic_data_are_not_checked(names):
    assert names(is_main=False, synthetic_data=True) == ["EarlyStopping", "MetricsLogging"]


def test_given_early_stopping_replaces_the_configured_one(names):
    assert "EarlyStopping" not in names(EarlyStopping(patience=3, mode="min"), is_main=True)


def test_patience_is_that_of_the_configuration(make_config):
    config = make_config("train.early_stopping_patience=7")
    (stopping,) = [
        one
        for one in default_callbacks(config, [], is_main=False)
        if isinstance(one, EarlyStopping)
    ]
    assert stopping.patience == 7
