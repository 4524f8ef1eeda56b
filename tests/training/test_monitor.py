"""The score that decides which checkpoint is best, and the interval of a validation's AUROC."""

import json

import pytest

from cxr_vit import Callback, ChestXrayDataModule, JsonlLogger, Trainer, ViTModule
from cxr_vit.config.fields import less_is_better
from cxr_vit.errors import ConfigError
from cxr_vit.evaluation.bootstrap import Resamples
from cxr_vit.evaluation.predictions import predictions_of
from cxr_vit.evaluation.scores import score
from runs import Recorder, Run, Scored, StopAt

EVERY_STEP = ["train.eval_every_steps=1", "train.checkpoint_every_steps=1", "train.keep_last=9"]


class WithF1(Scored):
    """Has a given score under another name, and the default one, which is always better."""

    def compute_metrics(self, logits, labels):
        value = next(self.upcoming)
        return {"auroc_macro": 1.0 - value, "f1": value}


class Losses(Callback):
    """Keeps the loss of each validation."""

    def __init__(self):
        self.of = {}

    def on_validation_end(self, trainer, module):
        self.of[trainer.global_step] = trainer.callback_metrics["val/loss"]


@pytest.fixture
def make_f1(make_config, tmp_path):
    def make(*overrides, scores, callbacks=()):
        config = make_config(f"run.dir={tmp_path / 'run'}", *EVERY_STEP, *overrides)
        run = Run(config, scores, callbacks, ())
        run.module = WithF1(config, run.data, scores=scores)
        return run

    return make


def best(trainer):
    return trainer.checkpoints.linked("best").name


def test_best_has_the_least_loss(make_config, tmp_path):
    config = make_config(f"run.dir={tmp_path}", *EVERY_STEP, "train.monitor=loss", "optim.lr=0.05")
    data, losses = ChestXrayDataModule(config), Losses()
    trainer = Trainer(config, callbacks=[losses], loggers=[])
    trainer.fit(ViTModule(config, data), data)
    step = min(losses.of, key=losses.of.get)
    assert best(trainer) == f"step_{step:08d}"
    assert trainer.saver.best_score == losses.of[step]


def test_best_follows_a_score_of_ones_own(make_f1):
    trainer = make_f1("train.monitor=f1", scores=[0.1, 0.4, 0.2, 0.6, 0.3, 0.5]).fit()
    assert best(trainer) == "step_00000004"


def test_early_stopping_follows_the_same_score(make_f1):
    given = ["train.monitor=f1", "train.early_stopping_patience=2"]
    trainer = make_f1(*given, scores=[0.1, 0.4, 0.3, 0.2, 0.1, 0.1]).fit()
    assert (trainer.global_step, best(trainer)) == (4, "step_00000002")
    assert "without a better val/f1 than 0.4" in trainer.stop_reason


def test_misspelt_score_of_ones_own_is_refused_at_the_first_validation(make_f1):
    run = make_f1("train.monitor=f2", scores=[0.1] * 6)
    message = r"train\.monitor=f2: .* There are: auroc_macro, f1, loss\."
    with pytest.raises(ConfigError, match=message):
        run.fit()
    assert run.trainer.global_step == 1


@pytest.mark.parametrize("name", ["average_precision/Herna", "val/auroc_macro", "auroc_macro_low"])
def test_misspelt_score_is_refused_before_the_first_step(make_config, tmp_path, name):
    config = make_config(
        f"run.dir={tmp_path}", f"train.monitor={name}", "evaluation.val_resamples=0"
    )
    data, recorder = ChestXrayDataModule(config), Recorder()
    message = f"train.monitor={name}: a validation has no such score. Did you mean '.*auroc_defined"
    with pytest.raises(ConfigError, match=message):
        Trainer(config, callbacks=[recorder]).fit(ViTModule(config, data), data)
    assert recorder.events == []


def test_resumed_run_with_another_monitor_begins_a_new_best(make_f1):
    scores = [0.2, 0.1, 0.3, 0.2, 0.1, 0.1]
    trainer = make_f1(scores=scores, callbacks=[StopAt(2)]).fit()
    assert (best(trainer), trainer.saver.best_score) == ("step_00000001", 0.8)
    trainer = make_f1("train.monitor=f1", scores=scores[1:]).resume()
    assert best(trainer) == "step_00000003"


def test_resumed_run_with_another_monitor_is_not_stopped_by_the_best_before(make_f1):
    scores = [0.1, 0.1, 0.2, 0.3, 0.4, 0.5]
    patience = "train.early_stopping_patience=2"
    make_f1(patience, scores=scores, callbacks=[StopAt(2)]).fit()
    trainer = make_f1(patience, "train.monitor=f1", scores=scores[1:]).resume()
    assert (trainer.global_step, best(trainer)) == (6, "step_00000006")


@pytest.mark.parametrize(
    ("score", "is_less"),
    [
        ("loss", True),
        ("val/loss", True),
        ("my_loss", True),
        ("my_loss/Hernia", True),
        ("auroc/volume loss", False),
        ("val/auroc/volume loss", False),
        ("auroc_macro", False),
        ("lossless", False),
    ],
)
def test_less_is_better_of_losses_alone(score, is_less):
    assert less_is_better(score) == is_less


# The interval


def logged(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if "val/loss" in event]


def test_interval_of_a_validation_is_that_of_a_report(make_config, tmp_path, monkeypatch):
    # Most resamples of so few patients lack a finding.
    monkeypatch.setattr("cxr_vit.evaluation.bootstrap._LEAST_DEFINED", 0.01)
    config = make_config(f"run.dir={tmp_path}", "data.val_fraction=0.7")
    data, module = ChestXrayDataModule(config), None
    module, trainer = ViTModule(config, data), Trainer(config, loggers=[JsonlLogger()])
    trainer.fit(module, data)
    predictions = predictions_of(data.dataset("val").records, trainer.validation_outputs)
    macro = score(predictions, Resamples(200))["means"]["macro"]["auroc"]
    event = logged(tmp_path)[-1]
    limits = event["val/auroc_macro_low"], event["val/auroc_macro_high"]
    assert limits == (macro["low"], macro["high"])
    assert limits[0] < event["val/auroc_macro"] < limits[1]
    assert trainer.validate(module, data)["val/auroc_macro_low"] == limits[0]
    tested = trainer.test(module, data, split="val")
    assert "val/auroc_macro" in tested and "val/auroc_macro_low" not in tested, "a report has it"


def test_no_resamples_are_no_interval(make_config, tmp_path):
    config = make_config(f"run.dir={tmp_path}", "evaluation.val_resamples=0")
    data = ChestXrayDataModule(config)
    Trainer(config, loggers=[JsonlLogger()]).fit(ViTModule(config, data), data)
    assert not any("auroc_macro_" in tag for tag in logged(tmp_path)[-1])


def test_scores_of_ones_own_have_no_interval(make_f1):
    trainer = make_f1(scores=[0.1] * 6).fit()
    assert list(trainer.validation_outputs.scores) == ["auroc_macro", "f1"]
