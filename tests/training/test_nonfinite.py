"""What a NaN in a loss or gradient does to a run."""

import hashlib
import json
import math

import pytest
import torch

from cxr_vit import Callback, ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.engines.base import StepOutput
from cxr_vit.errors import ConfigError, NonFiniteLoss
from cxr_vit.training.callback import TrainOutputs
from cxr_vit.training.callbacks import Window
from cxr_vit.training.nonfinite import NonFiniteGuard
from runs import StopAt, assert_same_state, last_state


class Broken(ViTModule):
    """Has a loss of `value` in some of the updates, of two micro-batches each."""

    def __init__(self, config, data, *, value=math.nan, updates=()):
        super().__init__(config, data)
        self.value, self.updates, self.calls = value, updates, 0

    def loss(self, logits, labels):
        loss = super().loss(logits, labels)
        if not (self.training and logits.requires_grad):
            return loss
        self.calls += 1
        is_bad = (self.calls - 1) // 2 in self.updates
        return loss * self.value if is_bad else loss


class Weights(Callback):
    """Keeps the weights after each update."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.after[outputs.step] = module.model.weights()


def train(make_config, tmp_path, *overrides, callbacks=(), **broken):
    config = make_config(f"run.dir={tmp_path / 'run'}", *overrides)
    assert config.batch.gradient_accumulation == 2
    data, weights = ChestXrayDataModule(config), Weights()
    module, trainer = (
        Broken(config, data, **broken),
        Trainer(config, callbacks=[weights, *callbacks]),
    )
    trainer.weights = weights.after
    try:
        trainer.fit(module, data)
    except NonFiniteLoss as error:
        return trainer, str(error)
    return trainer, ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_run_stops_before_the_update_and_describes_it(make_config, tmp_path, value):
    rate = "optim.base_lr=0.03" if value == -math.inf else "optim.lr=1e-3"
    trainer, error = train(make_config, tmp_path, rate, value=value, updates=[4])
    names = [trainer.train_data.image_names[row] for row in trainer.rows(4)]
    assert "at step 4 (lr " in error
    assert f"Lower {rate.partition('=')[0]}, set" in error
    assert f"images: {', '.join(names[:16])}" in error
    assert "step_00000003" in error
    file = tmp_path / "run" / "nonfinite_step_00000004.json"
    assert error.endswith(f"Details: {file}")
    details = json.loads(file.read_text())
    assert [image["name"] for image in details["images"]] == names
    batch = trainer.train_data.__getitems__(trainer.draws(4).tolist())
    hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
    assert [image["sha256"] for image in details["images"]] == hashes
    assert details["weights"]["nonfinite"] == []
    assert 0 < details["weights"]["largest"] < 10
    before, now = trainer.weights[4], trainer.module.model.weights()
    assert all(torch.equal(before[name], now[name]) for name in now), "no update was made"


def test_ranges_are_those_of_the_stages(make_config, tmp_path):
    overrides = ["pipeline.layers_per_stage=[1,3]", "model.name=vit-micro"]
    trainer, _ = train(make_config, tmp_path, *overrides, updates=[4])
    details = json.loads((tmp_path / "run" / "nonfinite_step_00000004.json").read_text())
    images = trainer.train_data.__getitems__(trainer.draws(4).tolist()).images
    model = trainer.module.model.eval()
    with torch.no_grad():
        hidden = model.stage(0)(images)
        logits = model.stage(1)(hidden)
    assert [stage["nonfinite"] for stage in details["activations"]] == [0, 0]
    for stage, output in zip(details["activations"], (hidden, logits)):
        # A host batch of evaluation may hold fewer images.
        assert output.min() <= stage["smallest"] + 1e-5
        assert output.max() >= stage["largest"] - 1e-5
        assert stage["largest"] > stage["smallest"]


def test_weights_that_are_not_finite_are_named(make_config, tmp_path):
    config = make_config(f"run.dir={tmp_path / 'run'}")
    data = ChestXrayDataModule(config)
    module = ViTModule(config, data)

    class Poison(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 2:
                with torch.no_grad():
                    dict(module.model.hub_parameters())["classifier.bias"][0] = math.nan

    with pytest.raises(NonFiniteLoss):
        Trainer(config, callbacks=[Poison()]).fit(module, data)
    details = json.loads((tmp_path / "run" / "nonfinite_step_00000002.json").read_text())
    assert details["weights"]["nonfinite"] == ["classifier.bias"]
    assert details["activations"][-1]["nonfinite"] > 0


def test_update_is_left_out_and_the_run_goes_on(make_config, tmp_path, caplog):
    skip = "train.on_nonfinite=skip_update"
    trainer, error = train(make_config, tmp_path, skip, "train.log_every_steps=1", updates=[2, 4])
    assert error == ""
    assert trainer.is_complete
    weights = trainer.weights
    same = [
        step
        for step in range(2, 7)
        if all(torch.equal(weights[step][name], weights[step - 1][name]) for name in weights[1])
    ]
    assert same == [3, 5]
    assert "at step 2 (lr " in caplog.text
    assert "its update is left out, images: " in caplog.text
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    key = "train/skipped_updates"
    assert [(event["step"], event[key]) for event in events if key in event] == [(3, 1), (5, 2)]
    losses = {event["step"]: event["train/loss"] for event in events if "train/loss" in event}
    assert [step for step, loss in losses.items() if loss is None] == [3, 5]


def test_resumed_run_leaves_out_the_same(make_config, tmp_path):
    skip = "train.on_nonfinite=skip_update"
    whole, _ = train(make_config, tmp_path / "a", skip, updates=[2, 4])
    train(make_config, tmp_path / "b", skip, callbacks=[StopAt(4)], updates=[2])
    config = make_config(f"run.dir={tmp_path / 'b' / 'run'}", skip)
    data = ChestXrayDataModule(config)
    trainer = Trainer(config)
    trainer.fit(Broken(config, data, updates=[0]), data, tmp_path / "b" / "run")
    assert_same_state(last_state(trainer)[0], last_state(whole)[0])
    assert last_state(trainer)[1]["callbacks"]["nonfinite"] == {"skipped": 2, "in_a_row": 0}


def test_run_of_nothing_but_nan_ends(make_config, tmp_path):
    overrides = ["train.on_nonfinite=skip_update", "train.steps=30", "train.eval_every_steps=30"]
    _, error = train(make_config, tmp_path, *overrides, updates=range(3, 30))
    assert "at step 22" in error
    assert "in the last of 20 updates in a row" in error


def test_gradient_that_is_not_finite_is_reported_although_the_loss_is(make_config, tmp_path):
    class BadGradient(ViTModule):
        def loss(self, logits, labels):
            return super().loss(logits, labels) + (logits - logits).abs().sqrt().sum()

    config = make_config(f"run.dir={tmp_path / 'run'}")
    data = ChestXrayDataModule(config)
    with pytest.raises(NonFiniteLoss, match=r"the gradient norm is nan at step 0"):
        Trainer(config).fit(BadGradient(config, data), data)


def test_step_within_a_host_batch_is_named():
    class FakeTrainer:
        def rows(self, step):
            raise AssertionError(step)

    output = StepOutput(torch.tensor([0.5, math.nan]), None, 4)
    outputs = TrainOutputs(41, 43, output, 0.1, 0.0, 1.0)
    with pytest.raises(AssertionError, match=r"^42$"):
        NonFiniteGuard(skips=True).on_train_batch_end(FakeTrainer(), None, outputs, None, 0)


def test_losses_that_are_not_finite_are_no_part_of_the_mean():
    window = Window()
    output = StepOutput(torch.tensor([0.5, math.nan]), None, 4)
    window.add(TrainOutputs(0, 2, output, 0.1, 0.0, 1.0))
    assert window.summary()["train/loss"] == 0.5


def test_an_ipu_cannot_leave_an_update_out(make_config):
    from cxr_vit.config.ipu_rules import check_ipu

    with pytest.raises(ConfigError, match=r"on_nonfinite=skip_update.* Set stop"):
        check_ipu(make_config("train.on_nonfinite=skip_update"))


@pytest.mark.parametrize("mode", ["stop", "skip_update"])
def test_finite_gradient_of_an_infinite_loss_is_told_as_such(make_config, tmp_path, caplog, mode):
    class Infinite(ViTModule):
        def loss(self, logits, labels):
            return super().loss(logits, labels) + math.inf

    config = make_config(f"run.dir={tmp_path / 'run'}", f"train.on_nonfinite={mode}")
    data = ChestXrayDataModule(config)
    trainer = Trainer(config)
    if mode == "stop":
        with pytest.raises(NonFiniteLoss, match="the loss is inf at step 0"):
            trainer.fit(Infinite(config, data), data)
        return
    trainer.fit(Infinite(config, data), data)
    assert trainer.is_complete
    assert "its gradient is finite and its update made" in caplog.text
    assert "left out" not in caplog.text


def test_host_batch_ends_at_the_first_bad_update(make_config, tmp_path):
    trainer, error = train(
        make_config, tmp_path, "batch.device_iterations=2", "train.eval_every_steps=2", updates=[2]
    )
    assert "at step 2 (lr " in error
    before, now = trainer.weights[2], trainer.module.model.weights()
    assert all(torch.equal(before[name], now[name]) for name in now), "step 3 was not made either"


class Scaler:
    """A loss scaler of a GPU, which halves its scale where a gradient overflows."""

    def __init__(self):
        self.value = 4.0

    def is_enabled(self):
        return True

    def scale(self, loss):
        return loss * self.value

    def unscale_(self, optimizer):
        self.is_finite = all(
            bool(weight.grad.isfinite().all())
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight.grad is not None
        )
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad /= self.value

    def step(self, optimizer):
        if self.is_finite:
            optimizer.step()

    def update(self):
        self.value *= 1 if self.is_finite else 0.5

    def get_scale(self):
        return self.value

    def state_dict(self):
        return {}


@pytest.mark.parametrize(("updates", "step"), [([1, 2], None), (range(1, 30), 4)])
def test_gradient_that_overflows_at_any_scale_is_no_matter_of_the_scale(
    make_config, tmp_path, updates, step
):
    class Scaled(Callback):
        def setup(self, trainer, module, stage):
            trainer.engine.scaler = Scaler()

    overrides = ["train.steps=8", "train.eval_every_steps=8"]
    trainer, error = train(
        make_config, tmp_path, *overrides, callbacks=[Scaled()], updates=updates, value=math.inf
    )
    if step is None:
        assert "gradient norm" not in error
        assert "the loss is inf at step 1" in error
    else:
        assert trainer.global_step <= step + 1
