import json

import pytest
import torch

from cxr_vit.config import BatchPlan
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import CheckpointError, NonFiniteLoss
from cxr_vit.model.stages import StagedViT
from cxr_vit.training.build import build_trainer, open_data
from cxr_vit.training.callbacks import EarlyStopping, NonFiniteGuard
from cxr_vit.training.loggers import JsonlLogger, MetricsLogging
from cxr_vit.training.run_folder import RunFolder
from cxr_vit.training.trainer import Callback


class Recorder(Callback):
    """Records the hooks and the checkpoints, each with its step."""

    def __init__(self):
        self.events = []
        self.lrs = []

    def on_fit_start(self, trainer):
        self.events.append(("fit_start", trainer.step))
        save = trainer.checkpoints.save

        def recorded(step, *arguments, **keywords):
            self.events.append(("checkpoint", step))
            return save(step, *arguments, **keywords)

        trainer.checkpoints.save = recorded

    def on_step_end(self, trainer, event):
        self.events.append(("step", event.step))
        self.lrs.append(event.lr)

    def on_eval_end(self, trainer, event):
        self.events.append(("eval", event.step))

    def on_fit_end(self, trainer):
        self.events.append(("fit_end", trainer.step))

    def on_exception(self, trainer, error):
        self.events.append((type(error).__name__, trainer.step))

    def of(self, kind):
        return [step for name, step in self.events if name == kind]


class StopAt(Callback):
    """Interrupts the run within a step, as a signal does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, event):
        if event.step == self.step:
            trainer.interrupt("test")


@pytest.fixture
def make_trainer(make_config, tmp_path):
    """Build a trainer of six steps with given validation scores."""

    def make(*overrides, scores=(), callbacks=(), folder="run"):
        config, launch = make_config(*overrides), Launch()
        data = open_data(config.data, launch)
        model = StagedViT.from_config(config, names=data.names, prevalence=data.prevalence())
        batch = BatchPlan.from_section(config.batch)
        engine = build_engine(config, model, choose_engine(config, launch), batch, launch)
        upcoming = iter(scores)
        return build_trainer(
            config,
            RunFolder(tmp_path / folder, writes=True),
            data,
            engine,
            callbacks,
            lambda logits, labels: {"auroc_macro": next(upcoming, 0.5)},
            model.hub_files(),
        )

    return make


def test_hooks_are_called_in_the_documented_order(make_trainer):
    recorder = Recorder()
    make_trainer(callbacks=[recorder]).fit()
    assert recorder.events == [
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


def test_last_step_is_always_validated_and_saved(make_trainer):
    recorder = Recorder()
    make_trainer(
        "train.eval_every_steps=4", "train.checkpoint_every_steps=100", callbacks=[recorder]
    ).fit()
    assert recorder.of("eval") == [4, 6]
    assert recorder.of("checkpoint")[-1] == 6


def test_learning_rates_follow_the_schedule(make_trainer):
    recorder = Recorder()
    trainer = make_trainer("schedule.warmup_steps=3", "optim.lr=0.003", callbacks=[recorder])
    trainer.fit()
    assert recorder.lrs == [trainer.learning_rate.at(step) for step in range(6)]
    assert recorder.lrs[:4] == pytest.approx([0, 0.001, 0.002, 0.003])


def test_best_points_at_the_best_score_and_last_at_the_last_step(make_trainer):
    trainer = make_trainer("train.eval_every_steps=2", scores=[0.6, 0.9, 0.7])
    trainer.fit()
    assert trainer.checkpoints.linked("best").name == "step_00000004"
    assert trainer.checkpoints.linked("last").name == "step_00000006"


def test_best_follows_last_until_a_score_is_defined(make_trainer, caplog):
    trainer = make_trainer(scores=[None, None])
    trainer.fit()
    assert trainer.checkpoints.linked("best").name == "step_00000006"
    assert "undefined" in caplog.text


def test_undefined_score_does_not_replace_a_defined_one(make_trainer):
    trainer = make_trainer(scores=[0.6, None])
    trainer.fit()
    assert trainer.checkpoints.linked("best").name == "step_00000003"


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
    assert trainer.checkpoints.linked("last").name == "step_00000006"
    assert recorder.events[-1] == ("fit_end", 6)


def test_interrupted_run_saves_its_step(make_trainer):
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder, StopAt(2)])
    trainer.fit()
    assert trainer.interrupted
    assert recorder.of("eval") == []
    assert recorder.of("checkpoint") == [2]
    assert "stopped at step 2: test" in trainer.describe_end()


def test_non_finite_loss_ends_the_run_without_saving(make_trainer):
    make_trainer(callbacks=[NonFiniteGuard()]).fit()
    recorder = Recorder()
    broken = make_trainer(callbacks=[recorder, NonFiniteGuard()], folder="broken")
    with torch.no_grad():
        broken.engine.model.stages[0].vit.embeddings.cls_token.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 0 .*\.png"):
        broken.fit()
    assert broken.checkpoints.steps() == []
    assert recorder.events[-1] == ("NonFiniteLoss", 1)


def test_each_sample_is_used_once_per_epoch(make_trainer):
    trainer = make_trainer("train.steps=20", "train.eval_every_steps=20")
    train_step, seen, expected = trainer.engine.train_step, [], []

    def watched(batch, *, lr):
        seen.extend(batch.indices.tolist())
        expected.extend(trainer.rows(trainer.step))
        return train_step(batch, lr=lr)

    trainer.engine.train_step = watched
    trainer.fit()
    assert expected == seen
    count = len(trainer.train_data)
    assert sorted(seen[:count]) == list(range(count))
    assert sorted(seen[count : 2 * count]) == list(range(count))
    assert seen[:count] != seen[count : 2 * count]


def test_interruption_of_another_process_ends_the_run_here_too(make_trainer):
    trainer = make_trainer()
    trainer.engine.any_process = lambda flag: trainer.step == 4
    trainer.fit()
    assert (trainer.step, trainer.interrupted) == (4, True)
    assert "stopped at step 4: another process was interrupted" in trainer.describe_end()
    assert trainer.checkpoints.linked("last").name == "step_00000004"


@pytest.mark.parametrize("stop", [3, 6])
def test_validation_prevented_by_a_stop_is_done_on_resume(make_trainer, stop):
    scores = {3: 0.9, 6: 0.8}
    stopped = make_trainer(callbacks=[StopAt(stop)], scores=[scores[3]])
    stopped.fit()
    assert not stopped.is_complete
    assert f"stopped at step {stop}" in stopped.describe_end()
    recorder = Recorder()
    resumed = make_trainer(
        callbacks=[recorder], scores=[scores[step] for step in (3, 6) if step >= stop]
    )
    resumed.resume(resumed.checkpoints.folder / "last")
    resumed.fit()
    assert recorder.of("eval") == [step for step in (3, 6) if step >= stop]
    assert resumed.is_complete
    assert resumed.describe_end().startswith("finished")
    assert resumed.checkpoints.linked("best").name == "step_00000003"


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("run.seed=5", "seed"),
        ("batch.gradient_accumulation=4", "global_batch_size"),
    ],
)
def test_run_with_other_facts_is_not_resumed(make_trainer, override, fact):
    make_trainer("train.steps=3").fit()
    other = make_trainer(override)
    with pytest.raises(CheckpointError, match=f"with another {fact}"):
        other.resume(other.checkpoints.folder / "last")


def test_weights_alone_can_be_resumed(make_trainer):
    first = make_trainer("train.steps=3")
    first.fit()
    second = make_trainer()
    second.resume(second.checkpoints.folder / "last", weights_only=True)
    assert second.step == 3
    state = second.engine.state_dict()
    assert (state.optimizer, state.scalars["updates"]) == ({}, 3.0)
    expected = first.engine.state_dict().weights
    assert all(torch.equal(expected[name], weight) for name, weight in state.weights.items())
    second.fit()
    assert second.is_complete


def test_run_is_not_resumed_past_its_end(make_trainer):
    make_trainer().fit()
    shorter = make_trainer("train.steps=3")
    with pytest.raises(CheckpointError, match="at step 6, past this run's 3 steps"):
        shorter.resume(shorter.checkpoints.folder / "last")


def test_non_finite_weights_are_not_saved(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.engine.model.stages[3].classifier.bias[2] = float("inf")
    with pytest.raises(NonFiniteLoss, match=r"1 weights are not finite.*classifier\.bias"):
        trainer.save()
    assert trainer.checkpoints.steps() == []


def test_resumed_log_equals_the_uninterrupted_one(make_trainer, tmp_path):
    def losses(name):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if "train/loss" in event]

    def logging(name):
        return MetricsLogging([JsonlLogger(tmp_path / f"{name}.jsonl")], every=3)

    make_trainer(callbacks=[logging("whole")], folder="whole").fit()
    make_trainer(callbacks=[logging("cut"), StopAt(4)], folder="cut").fit()
    resumed = make_trainer(callbacks=[logging("cut")], folder="cut")
    resumed.resume(resumed.checkpoints.folder / "last")
    resumed.fit()
    for one, other in zip(losses("whole"), losses("cut")):
        assert (one["step"], one["train/loss"]) == (other["step"], other["train/loss"])
    assert len(losses("cut")) == 2


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(make_trainer, stop):
    settings = ("model.dropout=0.1", "optim.weight_decay=0.1", "schedule.warmup_ratio=0.5")
    whole = make_trainer(*settings, folder="whole")
    whole.fit()
    make_trainer(*settings, callbacks=[StopAt(stop)], folder="cut").fit()
    recorder = Recorder()
    resumed = make_trainer(*settings, callbacks=[recorder], folder="cut")
    resumed.resume(resumed.checkpoints.folder / "last")
    resumed.fit()
    assert recorder.of("step") == list(range(stop + 1, 7))
    expected, state = whole.engine.state_dict(), resumed.engine.state_dict()
    assert all(
        torch.equal(expected.weights[name], state.weights[name]) for name in expected.weights
    )
    for name, slots in expected.optimizer.items():
        for slot, value in slots.items():
            assert torch.equal(value, state.optimizer[name][slot]), (name, slot)


def test_resumed_run_keeps_the_best_score(make_trainer):
    first = make_trainer("train.steps=3", scores=[0.9])
    first.fit()
    second = make_trainer(scores=[0.8])
    second.resume(second.checkpoints.folder / "last")
    second.fit()
    assert second.checkpoints.linked("best").name == "step_00000003"


def test_checkpoint_has_labels_best_score_and_callback_states(make_trainer):
    trainer = make_trainer(scores=[0.7, 0.6], callbacks=[EarlyStopping(5)])
    trainer.fit()
    state = json.loads((trainer.checkpoints.folder / "last" / "trainer_state.json").read_text())
    assert state["labels"][0] == "Atelectasis"
    assert (state["format"], state["best_score"]) == (2, 0.7)
    assert state["callbacks"] == {"early_stopping": {"best": 0.7, "since_best": 1}}


def test_checkpoint_of_format_1_resumes_the_same_run(make_trainer, tmp_path):
    def callbacks():
        logging = MetricsLogging([JsonlLogger(tmp_path / "log.jsonl")], every=3)
        return [EarlyStopping(5), logging]

    cut = make_trainer(callbacks=[*callbacks(), StopAt(4)], scores=[0.7])
    cut.fit()
    file = cut.checkpoints.folder / "last" / "trainer_state.json"
    state = json.loads(file.read_text())
    callback_states = state["callbacks"]
    old_names = {"early_stopping": "EarlyStopping", "metrics": "MetricsLogging"}
    state["callbacks"] = {old_names[key]: value for key, value in callback_states.items()}
    state["callbacks"].update(NonFiniteGuard={}, Checkpointing={"best": state.pop("best_score")})
    file.write_text(json.dumps({**state, "format": 1}))

    resumed = make_trainer(callbacks=callbacks())
    resumed.resume(resumed.checkpoints.folder / "last")
    assert (resumed.step, resumed.evaluated_step, resumed.best_score) == (4, 3, 0.7)
    assert callback_states["metrics"]["num_samples"] > 0
    restored = {callback.state_key: callback.state_dict() for callback in resumed.callbacks}
    assert restored == callback_states


def test_missed_validation_that_ends_the_run_is_saved_and_trains_no_further(make_trainer):
    make_trainer(callbacks=[StopAt(3), EarlyStopping(1)], scores=[0.9]).fit()
    recorder = Recorder()
    resumed = make_trainer(callbacks=[recorder, EarlyStopping(1)], scores=[0.1])
    resumed.resume(resumed.checkpoints.folder / "last")
    resumed.best_score, resumed.callbacks[1].best = 0.9, 0.9  # of an earlier validation
    resumed.fit()
    assert recorder.of("step") == [] and recorder.of("eval") == [3]
    assert recorder.of("checkpoint") == [3]
    again = make_trainer(callbacks=[EarlyStopping(1)])
    again.resume(again.checkpoints.folder / "last")
    assert (again.step, again.evaluated_step, again.callbacks[0].since_best) == (3, 3, 1)


def test_two_callbacks_cannot_share_a_state_key(make_trainer):
    with pytest.raises(AssertionError, match="state_key"):
        make_trainer(callbacks=[EarlyStopping(1), EarlyStopping(2)])
