import json

import pytest
import torch
from conftest import engine_of

from cxr_vit.config import BatchPlan
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.errors import CheckpointError, NonFiniteLoss
from cxr_vit.model.stages import StagedViT
from cxr_vit.training.checkpoint import CheckpointStore
from cxr_vit.training.loggers import JsonlLogger, MetricsLogging
from cxr_vit.training.schedule import Durations, LearningRate
from cxr_vit.training.trainer import Callback, Checkpointing, EarlyStopping, NonFiniteGuard, Trainer


class Recorder(Callback):
    """Writes down every hook with its step."""

    def __init__(self):
        self.hooks = []
        self.lrs = []

    def on_fit_start(self, trainer):
        self.hooks.append(("fit_start", trainer.step))

    def on_step_end(self, trainer, event):
        self.hooks.append(("step", event.step))
        self.lrs.append(event.lr)

    def on_eval_end(self, trainer, event):
        self.hooks.append(("eval", event.step))

    def on_checkpoint(self, trainer, path):
        self.hooks.append(("checkpoint", int(path.name[5:])))

    def on_fit_end(self, trainer):
        self.hooks.append(("fit_end", trainer.step))

    def on_exception(self, trainer, error):
        self.hooks.append((type(error).__name__, trainer.step))

    def of(self, kind):
        return [step for hook, step in self.hooks if hook == kind]


@pytest.fixture
def make_trainer(make_config, tmp_path):
    """A trainer of six steps whose validation scores can be chosen."""

    def make(*overrides, scores=(), callbacks=(), folder="run"):
        config = make_config(*overrides)
        data = ChestXrayDataModule(config.data)
        model = StagedViT.from_config(config, names=data.names, prevalence=data.prevalence())
        training = data.dataset("train")
        batch = BatchPlan.from_section(config.batch)
        durations = Durations.from_section(config.train, batch, len(training))
        upcoming = iter(scores)
        return Trainer(
            engine=engine_of(config, model),
            train=training,
            val=data.dataset("val"),
            durations=durations,
            learning_rate=LearningRate.from_section(
                config.schedule, peak=config.optim.lr, total_steps=durations.total_steps
            ),
            seed=config.run.seed,
            callbacks=[
                *callbacks,
                Checkpointing(every=durations.checkpoint_every, keep_last=config.train.keep_last),
            ],
            score=lambda logits, labels: {"auroc_macro": next(upcoming, 0.5)},
            store=CheckpointStore(tmp_path / folder),
            model_files=model.hub_files(),
            origin={"labels": data.names},
        )

    return make


def test_hooks_come_in_the_documented_order(make_trainer):
    recorder = Recorder()
    make_trainer(callbacks=[recorder]).fit()
    assert recorder.hooks == [
        ("fit_start", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("eval", 3),
        ("checkpoint", 3),
        ("step", 4),
        ("step", 5),
        ("step", 6),
        ("eval", 6),
        ("checkpoint", 6),
        ("fit_end", 6),
    ]


def test_device_iterations_count_as_steps(make_trainer):
    recorder = Recorder()
    make_trainer("batch.device_iterations=2", callbacks=[recorder]).fit()
    assert recorder.of("step") == [2, 4, 6]
    assert recorder.of("eval") == [4, 6], "3 lies within the second host call"


def test_the_last_step_is_validated_and_saved_in_any_case(make_trainer):
    recorder = Recorder()
    make_trainer(
        "train.eval_every_steps=4", "train.checkpoint_every_steps=100", callbacks=[recorder]
    ).fit()
    assert recorder.of("eval") == [4, 6]
    assert recorder.of("checkpoint")[-1] == 6


def test_learning_rates_are_the_schedules(make_trainer):
    recorder = Recorder()
    trainer = make_trainer("schedule.warmup_steps=3", "optim.lr=0.003", callbacks=[recorder])
    trainer.fit()
    assert recorder.lrs == [trainer.learning_rate.at(step) for step in range(6)]
    assert recorder.lrs[:4] == pytest.approx([0, 0.001, 0.002, 0.003])


def test_best_points_at_the_best_score_and_last_at_the_end(make_trainer):
    trainer = make_trainer("train.eval_every_steps=2", scores=[0.6, 0.9, 0.7])
    trainer.fit()
    assert trainer.store.linked("best").name == "step_00000004"
    assert trainer.store.linked("last").name == "step_00000006"


def test_until_a_score_is_defined_best_follows_the_last(make_trainer, caplog):
    trainer = make_trainer(scores=[None, None])
    trainer.fit()
    assert trainer.store.linked("best").name == "step_00000006"
    assert "undefined" in caplog.text


def test_an_undefined_score_does_not_displace_a_defined_one(make_trainer):
    trainer = make_trainer(scores=[0.6, None])
    trainer.fit()
    assert trainer.store.linked("best").name == "step_00000003"


def test_early_stopping_ends_the_run_after_saving(make_trainer):
    recorder = Recorder()
    trainer = make_trainer(
        "train.steps=20",
        "train.eval_every_steps=2",
        scores=[0.9, 0.8, 0.7],
        callbacks=[recorder, EarlyStopping(2)],
    )
    trainer.fit()
    assert trainer.step == 6
    assert "early stopping" in trainer.stop_reason and not trainer.interrupted
    assert trainer.store.linked("last").name == "step_00000006"
    assert recorder.hooks[-1] == ("fit_end", 6)


def test_an_interruption_saves_the_step_it_came_to(make_trainer):
    class Stop(Callback):
        def on_step_end(self, trainer, event):
            if event.step == 2:
                trainer.interrupt("SIGTERM received")

    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder, Stop()])
    trainer.fit()
    assert trainer.interrupted
    assert recorder.of("eval") == []
    assert recorder.of("checkpoint") == [2]
    assert "stopped at step 2: SIGTERM received" in trainer.describe_end()


def test_a_non_finite_loss_ends_the_run_and_is_not_saved(make_trainer):
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder, NonFiniteGuard([f"{k}.png" for k in range(80)])])
    trainer.fit()
    broken = make_trainer(callbacks=[recorder, *trainer.callbacks[1:2]], folder="broken")
    with torch.no_grad():
        broken.engine.model.stages[0].vit.embeddings.cls_token.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 0 .*\.png"):
        broken.fit()
    assert broken.store.steps() == []
    assert recorder.hooks[-1] == ("NonFiniteLoss", 1)


def test_every_sample_of_an_epoch_is_seen_once(make_trainer):
    trainer = make_trainer("train.steps=20", "train.eval_every_steps=20")
    train_step, seen, told = trainer.engine.train_step, [], []

    def watched(batch, *, lr):
        seen.extend(batch.indices.tolist())
        told.extend(trainer.rows(trainer.step))
        return train_step(batch, lr=lr)

    trainer.engine.train_step = watched
    trainer.fit()
    assert told == seen
    count = len(trainer.train)
    assert sorted(seen[:count]) == list(range(count))
    assert sorted(seen[count : 2 * count]) == list(range(count))
    assert seen[:count] != seen[count : 2 * count]


def test_a_stop_that_another_process_was_told_ends_the_run_here_too(make_trainer):
    trainer = make_trainer()
    trainer.engine.agree = lambda flag: trainer.step == 4
    trainer.fit()
    assert (trainer.step, trainer.interrupted) == (4, True)
    assert "stopped at step 4: another process was told to stop" in trainer.describe_end()
    assert trainer.store.linked("last").name == "step_00000004"


class StopAt(Callback):
    """As a signal that comes within a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, event):
        if event.step == self.step:
            trainer.interrupt("test")


@pytest.mark.parametrize("stop", [3, 6])
def test_a_validation_that_a_stop_prevented_is_made_up_for(make_trainer, stop):
    scores = {3: 0.9, 6: 0.8}
    stopped = make_trainer(callbacks=[StopAt(stop)], scores=[scores[3]])
    stopped.fit()
    assert not stopped.is_complete
    assert f"stopped at step {stop}" in stopped.describe_end()
    recorder = Recorder()
    resumed = make_trainer(
        callbacks=[recorder], scores=[scores[step] for step in (3, 6) if step >= stop]
    )
    resumed.resume(resumed.store.folder / "last")
    resumed.fit()
    assert recorder.of("eval") == [step for step in (3, 6) if step >= stop]
    assert resumed.is_complete
    assert resumed.describe_end().startswith("finished")
    assert resumed.store.linked("best").name == "step_00000003"


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("run.seed=5", "seed"),
        ("batch.gradient_accumulation=4", "global_batch_size"),
    ],
)
def test_a_run_is_not_resumed_as_another(make_trainer, override, fact):
    make_trainer("train.steps=3").fit()
    other = make_trainer(override)
    with pytest.raises(CheckpointError, match=f"with another {fact}"):
        other.resume(other.store.folder / "last")


def test_weights_alone_can_be_resumed(make_trainer):
    first = make_trainer("train.steps=3")
    first.fit()
    second = make_trainer()
    second.resume(second.store.folder / "last", weights_only=True)
    assert second.step == 3
    state = second.engine.state_dict()
    assert (state.optimizer, state.scalars["updates"]) == ({}, 3.0)
    expected = first.engine.state_dict().weights
    assert all(torch.equal(expected[name], weight) for name, weight in state.weights.items())
    second.fit()
    assert second.is_complete


def test_a_run_is_not_resumed_past_its_end(make_trainer):
    make_trainer().fit()
    shorter = make_trainer("train.steps=3")
    with pytest.raises(CheckpointError, match="at step 6, past this run's 3 steps"):
        shorter.resume(shorter.store.folder / "last")


def test_weights_that_are_not_finite_are_not_saved(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.engine.model.stages[3].classifier.bias[2] = float("inf")
    with pytest.raises(NonFiniteLoss, match=r"1 weights are not finite.*classifier\.bias"):
        trainer.save()
    assert trainer.store.steps() == []


def test_a_resumed_log_is_the_uninterrupted_one(make_trainer, tmp_path):
    def losses(name):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if "train/loss" in event]

    def logging(name):
        return MetricsLogging([JsonlLogger(tmp_path / f"{name}.jsonl")], every=3)

    make_trainer(callbacks=[logging("whole")], folder="whole").fit()
    make_trainer(callbacks=[logging("cut"), StopAt(4)], folder="cut").fit()
    resumed = make_trainer(callbacks=[logging("cut")], folder="cut")
    resumed.resume(resumed.store.folder / "last")
    resumed.fit()
    for one, other in zip(losses("whole"), losses("cut")):
        assert (one["step"], one["train/loss"]) == (other["step"], other["train/loss"])
    assert len(losses("cut")) == 2


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(make_trainer, stop):
    settings = ("model.dropout=0.1", "optim.weight_decay=0.1", "schedule.warmup_ratio=0.5")
    whole = make_trainer(*settings, folder="whole")
    whole.fit()
    make_trainer(*settings, callbacks=[StopAt(stop)], folder="cut").fit()
    recorder = Recorder()
    resumed = make_trainer(*settings, callbacks=[recorder], folder="cut")
    resumed.resume(resumed.store.folder / "last")
    resumed.fit()
    assert recorder.of("step") == list(range(stop + 1, 7))
    expected, state = whole.engine.state_dict(), resumed.engine.state_dict()
    assert all(
        torch.equal(expected.weights[name], state.weights[name]) for name in expected.weights
    )
    for name, slots in expected.optimizer.items():
        for slot, value in slots.items():
            assert torch.equal(value, state.optimizer[name][slot]), (name, slot)


def test_a_resumed_run_knows_the_best_score(make_trainer):
    first = make_trainer("train.steps=3", scores=[0.9])
    first.fit()
    second = make_trainer(scores=[0.8])
    second.resume(second.store.folder / "last")
    second.fit()
    assert second.store.linked("best").name == "step_00000003"


def test_a_checkpoint_carries_labels_and_callback_states(make_trainer):
    trainer = make_trainer(scores=[0.7, 0.6], callbacks=[EarlyStopping(5)])
    trainer.fit()
    state = json.loads((trainer.store.folder / "last" / "trainer_state.json").read_text())
    assert state["labels"][0] == "Atelectasis"
    assert state["callbacks"]["EarlyStopping"] == {"best": 0.7, "since_best": 1}
    assert state["callbacks"]["Checkpointing"] == {"best": 0.7}
