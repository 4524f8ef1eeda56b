"""What a step does so that a GPU never waits for the host, with the device played by the CPU."""

import contextlib
import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import engine_of, module_of
from cxr_vit import Callback, ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.base import StepOutput
from cxr_vit.engines.optim import can_skip_on_device, counts_on_device
from cxr_vit.engines.torch_engine import TorchEngineBase
from cxr_vit.errors import NonFiniteLoss
from cxr_vit.model.optim import _has_fused_on_cpus
from cxr_vit.training.pace import Pace
from runs import StopAt, last_state

needs_fused = pytest.mark.skipif(
    not _has_fused_on_cpus(), reason="this torch has no fused AdamW on a CPU"
)


@pytest.fixture
def fused(monkeypatch):
    """Leave updates out as on a GPU."""
    monkeypatch.setattr("cxr_vit.engines.torch_engine._is_late", lambda device: True)


class LateCopy:
    """An event of a copy that writes the numbers where someone waits for it."""

    def __init__(self, numbers):
        self.numbers, self.host = numbers, torch.full_like(numbers, -1.0)

    def query(self):
        return False

    def synchronize(self):
        self.host.copy_(self.numbers)


@pytest.fixture
def late(monkeypatch):
    """Let every step return before its numbers are there; return the events."""
    copies = []

    def to_host(engine, numbers):
        copies.append(LateCopy(numbers))
        return copies[-1].host, copies[-1]

    monkeypatch.setattr(TorchEngineBase, "_to_host", to_host)
    return copies


def batch_of(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 1, 32, 32), dtype=torch.uint8, generator=generator)
    labels = (torch.rand(size, 14, generator=generator) < 0.2).float()
    return Batch(images, labels, torch.arange(size))


class Casts(TorchDispatchMode):
    """Counts how often each weight is cast."""

    def __init__(self, model):
        super().__init__()
        self.names = {id(weight): name for name, weight in model.named_parameters()}
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = self.names.get(id(args[0])) if args else None
        if name and function in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype):
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "every_layer"])
def test_weights_are_cast_once_per_update(make_config, monkeypatch, recompute):
    config = make_config(
        "engine.precision=bf16", f"pipeline.recompute={recompute}", "batch.gradient_accumulation=3"
    )
    batches = [batch_of(12, seed) for seed in range(2)]

    def train(engine):
        with Casts(engine.model) as casts:
            losses = [engine.train_step(batch, lr=1e-3).losses for batch in batches]
        return torch.cat(losses), engine.state_dict().weights, casts.counts

    once = train(engine_of(config, module_of(config)))
    monkeypatch.setattr(TorchEngineBase, "casting_once", lambda engine: contextlib.nullcontext())
    often = train(engine_of(config, module_of(config)))
    assert set(once[2].values()) == {2}
    assert min(often[2].values()) >= 6
    assert once[2].keys() == often[2].keys()
    assert torch.equal(once[0], often[0])
    assert all(torch.equal(once[1][name], weight) for name, weight in often[1].items())


def test_weights_are_cast_once_per_scored_host_batch(make_config):
    config = make_config("engine.precision=bf16", "batch.eval_micro_batch_size=2")
    engine = engine_of(config, module_of(config))
    with Casts(engine.model) as casts:
        engine.predict(batch_of(8))
    assert set(casts.counts.values()) == {1}


def same(one, other):
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())
    for name, slots in one.optimizer.items():
        assert slots.keys() == other.optimizer[name].keys()
        assert all(torch.equal(value, other.optimizer[name][slot]) for slot, value in slots.items())


@needs_fused
@pytest.mark.parametrize("written_fused", [True, False])
def test_state_of_a_fused_optimizer_is_restored(make_config, monkeypatch, written_fused):
    config = make_config()

    def engine(is_fused):
        monkeypatch.setattr("cxr_vit.model.optim._can_fuse", lambda groups: is_fused)
        return engine_of(config, module_of(config))

    first = engine(written_fused)
    for seed in range(2):
        first.train_step(batch_of(8, seed), lr=1e-3)
    state = first.state_dict()
    second = engine(True)
    second.train_step(batch_of(8, 7), lr=1e-3)  # a state of its own
    second.load_state_dict(state)
    same(second.state_dict(), state)
    outputs = [each.train_step(batch_of(8, 5), lr=1e-3) for each in (first, second)]
    assert torch.equal(outputs[0].losses, outputs[1].losses)
    ours, theirs = (each.state_dict() for each in (second, first))
    if written_fused:
        same(ours, theirs)
    for name, weight in ours.weights.items():
        assert torch.allclose(weight, theirs.weights[name], atol=1e-6), name
    assert {float(slots["step"]) for slots in ours.optimizer.values()} == {3.0}
    assert counts_on_device(second.optimizer) == {
        id(weight) for weight in second.model.parameters()
    }
    assert not counts_on_device(engine(False).optimizer)


@needs_fused
def test_count_of_updates_stays_fp32_for_weights_that_are_not(make_config):
    engine = engine_of(make_config(), module_of(make_config()))
    engine.train_step(batch_of(8), lr=1e-3)
    state, weight = engine.state_dict(), next(engine.model.parameters())
    weight.data = weight.data.bfloat16()
    engine.load_state_dict(state)
    slots = engine.optimizer.state[weight]
    assert [slots[name].dtype for name in ("step", "exp_avg")] == [torch.float32, torch.bfloat16]


class Broken(ViTModule):
    """Has a NaN loss in the given calls while it trains."""

    bad_calls = range(0)
    calls = 0

    def loss(self, logits, labels):
        loss = super().loss(logits, labels)
        if not (self.training and logits.requires_grad):
            return loss
        self.calls += 1
        return loss * math.nan if self.calls - 1 in self.bad_calls else loss


@needs_fused
@pytest.mark.parametrize("mode", ["stop", "skip_update"])
def test_update_is_left_out_on_the_device(make_config, fused, monkeypatch, mode):
    overrides = ["batch.device_iterations=2", "train.steps=10", f"train.on_nonfinite={mode}"]
    config = make_config(*overrides, "batch.gradient_accumulation=1")
    module = Broken(config, ChestXrayDataModule(config))
    module.setup()
    engine = engine_of(config, module)
    module.bad_calls = [2]  # the first update of the second host batch
    monkeypatch.setattr(torch.Tensor, "__bool__", None)  # nothing asks the device
    states = []
    for step in range(4):
        output = engine.train_step(batch_of(8, step), lr=1e-3)
        states.append(engine.model.weights())
        assert math.isfinite(output.grad_norm[0]) == (step != 1)
    monkeypatch.undo()
    counts = [float(slots["step"]) for slots in engine.state_dict().optimizer.values()]
    assert set(counts) == {4.0 if mode == "stop" else 7.0}
    unchanged = [
        step
        for step in range(1, 4)
        if all(torch.equal(weight, states[step - 1][name]) for name, weight in states[step].items())
    ]
    # To stop, the rest of this host batch and the next one are left out too.
    assert unchanged == ([1, 2] if mode == "stop" else [])


@needs_fused
def test_update_is_left_out_by_the_host_on_a_cpu(make_config):
    engine = engine_of(make_config(), module_of(make_config()))
    assert can_skip_on_device(engine.optimizer)
    assert engine.skip is None


def test_only_adam_leaves_out_on_the_device():
    weights = [torch.nn.Parameter(torch.ones(2))]
    assert not can_skip_on_device(torch.optim.AdamW(weights))
    assert not can_skip_on_device(torch.optim.SGD(weights, lr=0.1))


def test_factors_of_drop_path_are_copied_from_pinned_memory(make_config, monkeypatch):
    config = make_config("model.drop_path=0.3")
    engine, pinned = engine_of(config, module_of(config)), []
    engine.device = torch.device("cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(engine, "to_device", lambda *tensors: tensors)
    assert engine._paths(torch.arange(8)) is pinned[0]


class Hooks(Callback):
    """Records the hooks, and which steps were read when each began."""

    def __init__(self, copies):
        self.copies, self.calls = copies, []

    def _note(self, hook):
        read = sum(bool((copy.host != -1).all()) for copy in self.copies)
        self.calls.append((hook, read))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._note("start")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self._note("end")

    def on_validation_start(self, trainer, module):
        self._note("validation")

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self._note("save")


def fit(make_config, folder, *overrides, copies=(), bad_calls=(), callbacks=()):
    usual = [f"run.dir={folder}", "batch.gradient_accumulation=1", 'loggers=["jsonl"]']
    config = make_config(*usual, *overrides)
    data, hooks = ChestXrayDataModule(config), Hooks(list(copies) or copies)
    module, trainer = Broken(config, data), Trainer(config, callbacks=[hooks, *callbacks])
    module.bad_calls = bad_calls
    error = ""
    try:
        trainer.fit(module, data)
    except NonFiniteLoss as raised:
        error = str(raised).replace(str(folder), "")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = [
        {tag: value for tag, value in json.loads(line).items() if not tag.startswith("perf/")}
        for line in lines
    ]
    return trainer, hooks.calls, error, [event for event in events if len(event) > 1]


PERIODS = ["train.log_every_steps=3", "train.eval_every_steps=5", "train.checkpoint_every_steps=4"]


def without_skipped(events):
    """Return the events without the number of skipped updates, and the steps that had one."""
    steps = [event["step"] for event in events if event.pop("train/skipped_updates", None)]
    return [event for event in events if len(event) > 1], steps


def test_late_numbers_are_the_same_numbers(make_config, tmp_path, caplog, request):
    overrides = [*PERIODS, "train.steps=10", "train.on_nonfinite=skip_update"]
    bad = [6]  # the step, which nothing waits for
    known, _, _, events = fit(make_config, tmp_path / "a", *overrides, bad_calls=bad)
    expected, told = without_skipped(events), [each.getMessage() for each in caplog.records]
    assert any("at step 6 (lr " in message for message in told)
    assert expected[1] == [7]
    caplog.clear()
    copies = request.getfixturevalue("late")
    trainer, calls, _, events = fit(
        make_config, tmp_path / "b", *overrides, bad_calls=bad, copies=copies
    )
    assert without_skipped(events) == (expected[0], [8]), "known one step late"
    assert [each.getMessage() for each in caplog.records] == told
    assert len(copies) == 10
    same(last_state(trainer)[0], last_state(known)[0])
    starts = [read for hook, read in calls if hook == "start"]
    # Steps 3, 6 and 9 are logged, 4 and 8 saved, 5 validated, and an epoch ends with each 9th.
    assert starts == [0, 0, 1, 3, 4, 5, 6, 6, 8, 9]
    order = [hook for hook, _ in calls if hook in ("start", "end")]
    assert order == ["start", "end"] * 10
    assert all(read in (4, 5, 8, 10) for hook, read in calls if hook in ("validation", "save"))


@needs_fused
def test_late_nan_is_told_as_an_early_one(make_config, tmp_path, fused, request):
    overrides = [*PERIODS, "train.steps=10"]
    bad = [6]  # the step, which nothing waits for
    _, _, error, expected = fit(make_config, tmp_path / "a", *overrides, bad_calls=bad)
    copies = request.getfixturevalue("late")
    late_one = fit(make_config, tmp_path / "b", *overrides, bad_calls=bad, copies=copies)
    _, _, late_error, events = late_one
    assert late_error == error
    assert "at step 6 (lr " in error
    assert "step_00000005" in error
    assert events == expected
    assert len(copies) == 8, "step 7 was begun"
    details = [(tmp_path / run / "nonfinite_step_00000006.json").read_text() for run in ("a", "b")]
    assert details[0] == details[1], "step 7 changed no weight"
    assert not list((tmp_path / "b").glob("checkpoints/step_00000008"))


@needs_fused
def test_no_checkpoint_is_written_after_an_unread_nan(make_config, tmp_path, fused, late):
    overrides = ["train.log_every_steps=50", "train.steps=40", "train.eval_every_steps=40"]
    stop = StopAt(3)
    trainer, _, error, _ = fit(
        make_config, tmp_path, *overrides, bad_calls=[2], copies=late, callbacks=[stop]
    )
    assert "at step 2 (lr " in error
    assert "No checkpoint was written yet." in error
    assert trainer.checkpoints.linked("last") is None


def test_times_of_late_steps_add_up_to_the_time_that_passed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cxr_vit.training.pace.time.perf_counter", lambda: now[0])

    class Event:
        """A step of the device that ends at a time."""

        def __init__(self, end):
            self.end = end

        def query(self):
            return now[0] >= self.end

        def synchronize(self):
            now[0] = max(now[0], self.end)

    pace, total, end = Pace(), 0.0, now[0]
    for step in range(10):
        wait_s = 50.0 if step == 7 else 1.0  # the data are slow once
        now[0] += wait_s
        pace.start(wait_s)
        now[0] += 1.0  # the launch
        end = max(end, now[0]) + 20.0
        output = StepOutput(torch.zeros(1), None, 1, Event(end))
        waited, seconds = pace.end(output, reads=step in (4, 9))
        total += waited + seconds
        assert waited == {0: 1.0, 5: 1.0, 7: 50.0}.get(step, 0.0)
        now[0] += 5.0  # callbacks; the device is busy but after steps 4 and 9
    # Of the time, only the callbacks after step 4, which was read, and after step 9 do not count.
    assert total == now[0] - 100.0 - 10.0
