"""The trainer on the torch engine: steps, validations, checkpoints, stopping, resuming."""

import json
import shutil

import pytest
import torch

from cxr_vit import Callback, ChestXrayDataModule, JsonlLogger, Trainer, ViTModule
from cxr_vit.checkpoint_files import state_text
from cxr_vit.engines.torch_engine import TorchEngine
from cxr_vit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NonFiniteLoss,
    OutOfMemory,
)
from cxr_vit.model.optim import explaining_missing_rate
from cxr_vit.training.callbacks import EarlyStopping
from cxr_vit.training.checkpoint import load_checkpoint
from cxr_vit.training.config_checks import check_module_config
from runs import AtStart, Recorder, StopAt, assert_same_state, last_state

# Steps, validations and checkpoints


def test_steps_validations_and_checkpoints_come_in_order(make):
    recorder = Recorder()
    make(callbacks=[recorder]).fit()
    assert recorder.events == [
        ("fit_start", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("validation", 3),
        ("checkpoint", 3),
        ("step", 4),
        ("step", 5),
        ("step", 6),
        ("validation", 6),
        ("checkpoint", 6),
        ("fit_end", 6),
    ]


def test_device_iterations_count_as_steps(make):
    recorder = Recorder()
    make("batch.device_iterations=2", callbacks=[recorder]).fit()
    assert recorder.of("step") == [2, 4, 6]
    assert recorder.of("validation") == [4, 6], "3 lies within the second host call"


def test_last_step_is_always_validated_and_saved(make):
    recorder = Recorder()
    make("train.eval_every_steps=4", "train.checkpoint_every_steps=100", callbacks=[recorder]).fit()
    assert recorder.of("validation") == [4, 6]
    assert recorder.of("checkpoint")[-1] == 6


def test_learning_rates_follow_the_schedule(make):
    recorder = Recorder()
    run = make("schedule.warmup_steps=3", "optim.lr=0.003", callbacks=[recorder])
    run.fit()
    assert recorder.lrs == [run.module.learning_rate(step, 6) for step in range(6)]
    assert recorder.lrs[:4] == pytest.approx([0, 0.001, 0.002, 0.003])


def test_each_sample_is_used_once_per_epoch(make):
    seen, expected = [], []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.extend(batch.indices.tolist())
            expected.extend(trainer.rows(trainer.global_step))

    trainer = make("train.steps=20", "train.eval_every_steps=20", callbacks=[Watch()]).fit()
    assert expected == seen
    count = len(trainer.train_data)
    assert sorted(seen[:count]) == list(range(count))
    assert sorted(seen[count : 2 * count]) == list(range(count))
    assert seen[:count] != seen[count : 2 * count]


def test_best_points_at_the_best_score_and_last_at_the_last_step(make):
    trainer = make("train.eval_every_steps=2", scores=[0.6, 0.9, 0.7]).fit()
    assert trainer.checkpoints.linked("best").name == "step_00000004"
    assert trainer.checkpoints.linked("last").name == "step_00000006"


def test_best_follows_last_until_a_score_is_defined(make, caplog):
    trainer = make(scores=[None, None]).fit()
    assert trainer.checkpoints.linked("best").name == "step_00000006"
    assert "undefined" in caplog.text


def test_undefined_score_does_not_replace_a_defined_one(make):
    trainer = make(scores=[0.6, None]).fit()
    assert trainer.checkpoints.linked("best").name == "step_00000003"


def test_checkpoint_has_labels_best_score_and_callback_states(make):
    trainer = make(scores=[0.7, 0.6], callbacks=[EarlyStopping(patience=5)]).fit()
    state = json.loads((trainer.checkpoints.folder / "last" / "trainer_state.json").read_text())
    assert state["labels"][0] == "Atelectasis"
    assert (state["format"], state["best_score"]) == (3, 0.7)
    expected = {"monitor": "val/auroc_macro", "best": 0.7, "since_best": 1}
    assert state["callbacks"]["early_stopping"] == expected
    assert set(state["callbacks"]) == {"early_stopping", "metrics"}


# Stopping


def test_early_stopping_ends_the_run_after_saving(make):
    recorder = Recorder()
    trainer = make(
        "train.steps=20",
        "train.eval_every_steps=2",
        scores=[0.9, 0.8, 0.7],
        callbacks=[recorder, EarlyStopping(patience=2)],
    ).fit()
    assert trainer.global_step == 6
    assert "early stopping" in trainer.stop_reason and not trainer.interrupted
    assert trainer.checkpoints.linked("last").name == "step_00000006"
    assert recorder.events[-1] == ("fit_end", 6)


def test_interrupted_run_saves_its_step(make, capsys):
    recorder = Recorder()
    trainer = make(callbacks=[recorder, StopAt(2)]).fit()
    assert trainer.interrupted
    assert recorder.of("validation") == []
    assert recorder.of("checkpoint") == [2]
    last = trainer.checkpoints.folder / "last"
    end = f"stopped at step 2: test; last checkpoint: {last}"
    assert capsys.readouterr().out.splitlines()[-1] == end


def test_interruption_of_another_process_ends_the_run_here_too(make, monkeypatch):
    run = make()
    monkeypatch.setattr(
        TorchEngine, "any_process", lambda engine, flag: run.trainer.global_step == 4
    )
    trainer = run.fit()
    assert (trainer.global_step, trainer.interrupted) == (4, True)
    assert "stopped at step 4: another process asked for it" in trainer.describe_end()
    assert trainer.checkpoints.linked("last").name == "step_00000004"


def test_non_finite_loss_ends_the_run_without_saving(make):
    recorder = Recorder()
    broken = make(callbacks=[recorder])
    broken.module.setup()
    with torch.no_grad():
        broken.module.model.stages[0].vit.embeddings.cls_token.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 0 .*\.png"):
        broken.fit()
    assert broken.trainer.checkpoints.steps() == []
    assert recorder.of("step") == [], "the guard comes first"
    assert recorder.events[-1] == ("NonFiniteLoss", 1)


def test_non_finite_weights_are_not_saved(make):
    def break_bias(trainer):
        with torch.no_grad():
            trainer.module.model.stages[3].classifier.bias[2] = float("inf")
        trainer.save_checkpoint()

    run = make(callbacks=[AtStart(break_bias)])
    with pytest.raises(NonFiniteLoss, match=r"1 weights are not finite.*classifier\.bias"):
        run.fit()
    assert run.trainer.checkpoints.steps() == []


@pytest.mark.parametrize("stop", [3, 6])
def test_validation_prevented_by_a_stop_is_done_on_resume(make, stop):
    scores = {3: 0.9, 6: 0.8}
    stopped = make(callbacks=[StopAt(stop)], scores=[scores[3]]).fit()
    assert not stopped.is_complete
    assert f"stopped at step {stop}" in stopped.describe_end()
    recorder = Recorder()
    left = [step for step in (3, 6) if step >= stop]
    resumed = make(callbacks=[recorder], scores=[scores[step] for step in left]).resume()
    assert recorder.of("validation") == left
    assert resumed.is_complete
    assert resumed.describe_end().startswith("finished")
    assert resumed.checkpoints.linked("best").name == "step_00000003"


# Resuming


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("run.seed=5", "seed"),
        ("batch.gradient_accumulation=4", "global_batch_size"),
    ],
)
def test_run_with_other_facts_is_not_resumed(make, override, fact):
    make("train.steps=3").fit()
    with pytest.raises(CheckpointError, match=f"with another {fact}"):
        make(override).resume()


def test_run_with_other_pixels_is_neither_resumed_nor_scored(make):
    first = make("train.steps=3").fit()
    other = make("model.image_mean=0.4", "model.image_std=[0.5, 0.5, 0.5]")
    with pytest.raises(CheckpointError, match="another image_mean: the weights were trained on im"):
        other.resume()
    with pytest.raises(CheckpointError, match=r"another read_size: .* or another part of them"):
        make("data.resize=40").resume()
    again = make("model.image_mean=0.4")
    checkpoint = first.run.checkpoints / "last"
    with pytest.raises(CheckpointError, match=r"image_mean=\[0\.5, 0\.5, 0\.5\], and this module"):
        again.trainer.test(again.module, again.data, ckpt_path=checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["image_mean"] == state["image_std"] == [0.5] * 3
    later = ("image_mean", "read_size", "digest")
    older = {key: value for key, value in state.items() if key not in later}
    (checkpoint / "trainer_state.json").write_text(state_text(older))
    make("model.image_mean=0.4", "data.resize=40").resume()  # written before these facts were


def test_checkpoint_with_other_labels_is_not_resumed(make, make_config):
    first = make("train.steps=3")
    first.fit()
    config = make_config("data.include_no_finding=true", f"run.dir={first.folder}")
    data = ChestXrayDataModule(config)
    with pytest.raises(CheckpointError, match="with another labels"):
        Trainer(config).fit(ViTModule(config, data), data, ckpt_path="last")


def test_weights_alone_can_be_resumed(make):
    first = make("train.steps=3").fit()
    started = []
    second = make(
        "train.resume_weights_only=true",
        callbacks=[AtStart(lambda trainer: started.append(trainer.engine.state_dict()))],
    ).resume()
    (state,) = started
    assert {slot for slots in state.optimizer.values() for slot in slots} == {"no_state"}
    assert state.scalars["updates"] == 3.0
    shutil.rmtree(str(second.checkpoints.folder / "step_00000006"))
    expected, _ = load_checkpoint(first.checkpoints.folder / "step_00000003")
    assert all(torch.equal(expected.weights[name], state.weights[name]) for name in state.weights)
    assert second.is_complete


def test_run_is_not_resumed_past_its_end(make):
    make().fit()
    with pytest.raises(CheckpointError, match="at step 6, past this run's 3 steps"):
        make("train.steps=3").resume()


def test_resumed_log_equals_the_uninterrupted_one(make):
    def losses(trainer):
        lines = (trainer.run.path / "metrics.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if "train/loss" in event]
        return [(event["step"], event["train/loss"]) for event in events]

    every = "train.log_every_steps=3"
    whole = make(every, loggers=[JsonlLogger()], folder="whole").fit()
    make(every, loggers=[JsonlLogger()], callbacks=[StopAt(4)], folder="cut").fit()
    resumed = make(every, loggers=[JsonlLogger()], folder="cut").resume()
    assert losses(resumed) == losses(whole)
    assert [step for step, _ in losses(resumed)] == [3, 6]


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(make, stop):
    settings = ("model.dropout=0.1", "optim.weight_decay=0.1", "schedule.warmup_ratio=0.5")
    whole = make(*settings, folder="whole").fit()
    make(*settings, callbacks=[StopAt(stop)], folder="cut").fit()
    recorder = Recorder()
    resumed = make(*settings, callbacks=[recorder], folder="cut").resume()
    assert recorder.of("step") == list(range(stop + 1, 7))
    assert_same_state(last_state(resumed)[0], last_state(whole)[0])


def test_resumed_run_keeps_the_best_score(make):
    make("train.steps=3", scores=[0.9]).fit()
    second = make(scores=[0.8]).resume()
    assert second.checkpoints.linked("best").name == "step_00000003"


def test_checkpoint_of_format_1_resumes_the_same_run(make):
    every = "train.log_every_steps=3"
    cut = make(every, callbacks=[EarlyStopping(patience=5), StopAt(4)], scores=[0.7]).fit()
    file = cut.checkpoints.folder / "last" / "trainer_state.json"
    state = json.loads(file.read_text())
    callback_states = state["callbacks"]
    old_names = {"early_stopping": "EarlyStopping", "metrics": "MetricsLogging"}
    state["callbacks"] = {old_names[key]: value for key, value in callback_states.items()}
    state["callbacks"].update(NonFiniteGuard={}, Checkpointing={"best": state.pop("best_score")})
    file.write_text(json.dumps({**state, "format": 1}))
    restored = {}

    def look(trainer):
        assert (trainer.global_step, trainer.evaluated_step, trainer.saver.best_score) == (
            4,
            3,
            0.7,
        )
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}
        restored.update(
            json.loads(json.dumps({key: state for key, state in states.items() if state}))
        )

    make(every, callbacks=[EarlyStopping(patience=5), AtStart(look)]).resume()
    assert callback_states["metrics"]["num_samples"] > 0
    assert restored == callback_states


def test_missed_validation_that_ends_the_run_is_saved_and_trains_no_further(make):
    make(callbacks=[StopAt(3), EarlyStopping(patience=1)], scores=[0.9]).fit()
    recorder, stopping = Recorder(), EarlyStopping(patience=1)

    def pretend(trainer):  # that an earlier validation was better
        trainer.saver.best_score = stopping.best = 0.9

    make(callbacks=[recorder, stopping, AtStart(pretend)], scores=[0.1]).resume()
    assert recorder.of("step") == [] and recorder.of("validation") == [3]
    assert recorder.of("checkpoint") == [3]
    found = []
    stopping = EarlyStopping(patience=1)
    look = AtStart(
        lambda trainer: found.append(
            (trainer.global_step, trainer.evaluated_step, stopping.since_best)
        )
    )
    make(callbacks=[stopping, look]).resume()
    assert found == [(3, 3, 1)]


def contents(folder):
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_finished_run_has_nothing_to_do_and_is_not_touched(make, capsys):
    first = make().fit()
    before = contents(first.run.path)
    capsys.readouterr()
    again = make()
    trainer = again.resume()
    (line,) = capsys.readouterr().out.splitlines()
    assert "step_00000006 is at step 6, the last one: nothing to do." in line
    assert "raise train.epochs or train.steps" in line
    assert contents(first.run.path) == before
    # The script goes on with the trained model.
    weights = last_state(first)[0].weights
    assert all(torch.equal(again.module.model.weights()[name], weights[name]) for name in weights)
    assert trainer.run.path == first.run.path
    trainer.test(again.module, again.data, ckpt_path="best")
    assert contents(first.run.path) == before


def test_finished_run_trains_on_with_more_steps(make):
    make("train.steps=3").fit()
    recorder = Recorder()
    make(callbacks=[recorder]).resume()
    assert recorder.of("step") == [4, 5, 6]


# Refusals


def test_two_callbacks_cannot_share_a_state_key(make):
    with pytest.raises(ConfigError, match="state_key 'early_stopping'"):
        make(callbacks=[EarlyStopping(patience=1), EarlyStopping(patience=2)])


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (EarlyStopping, r"callbacks: EarlyStopping is a class\. Give EarlyStopping\(\.\.\.\)"),
        (JsonlLogger(), r"callbacks: .*JsonlLogger.* is no cxr_vit\.Callback"),
    ],
)
def test_what_is_no_callback_is_refused(make, given, advice):
    with pytest.raises(ConfigError, match=advice):
        make(callbacks=[given])


@pytest.mark.parametrize(
    "override",
    [
        "model.dropout=0.5",
        "model.name=vit-tiny",
        "optim.lr=1",
        "loss.name=focal",
        "data.image_size=64",
        "data.include_no_finding=true",
        "run.seed=9",
    ],
)
def test_module_of_another_configuration_is_refused(make, make_config, override):
    run = make()
    more = ["pipeline.layers_per_stage=[3, 3, 3, 3]"] if "tiny" in override else []
    other = ViTModule(make_config(override, *more))
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"the module was made with another.*{key}=.* there"):
        run.trainer.fit(other, run.data)
    assert not run.trainer.is_fitting


@pytest.mark.parametrize(
    ("shared", "override", "words"),
    [
        ("optim.base_lr=0.1", "batch.micro_batch_size=1", r"peak_lr=0\.00078"),
        ("schedule.warmup_epochs=1", "train.epochs=9", r"train\.epochs=9\.0"),
    ],
)
def test_module_with_other_rates_is_refused(make_config, shared, override, words):
    settings = (shared, "train.steps=null", "train.epochs=2")
    module = ViTModule(make_config(*settings, override))
    with pytest.raises(ConfigError, match=f"made with another[^;]*: {words}[^;]* there"):
        check_module_config(make_config(*settings), module)
    check_module_config(make_config(*settings, override, "train.log_every_steps=9"), module)


def test_rate_that_is_none_is_explained(make):
    class Before(ViTModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameter_groups(), lr=self.config.optim.lr)

    class Stepwise(ViTModule):
        def learning_rate(self, step, total_steps):
            return self.config.optim.lr * 0.5

    words = ["optim.base_lr=0.1"]
    for kind in (Before, Stepwise):
        run = make(*words)
        with pytest.raises(ConfigError, match=r"with optim\.base_lr\. Use self\.config\.peak_lr"):
            run.trainer.fit(kind(run.trainer.config, run.data), run.data)
    explaining = explaining_missing_rate(run.trainer.config)
    with pytest.raises(TypeError, match="unsupported operand"), explaining:
        len(words) + words[0]


def test_data_of_another_image_size_are_refused(make, make_config):
    run = make()
    other = ChestXrayDataModule(make_config("data.image_size=64"))
    with pytest.raises(ConfigError, match=r"the data module was made.*data\.image_size=64 there"):
        run.trainer.validate(run.module, other)


@pytest.mark.parametrize("override", ["data.val_fraction=0.4", "augment.rotation=5", "run.seed=7"])
def test_training_on_other_data_than_the_configuration_says_is_refused(make, make_config, override):
    run = make()
    other = ChestXrayDataModule(make_config(override))
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"the data module was made.*{key}=.* there"):
        run.trainer.fit(run.module, other)


def test_second_fit_begins_again(make, tmp_path):
    """With a folder of its own, and without the patience that the first one used up."""
    run = make("run.dir=null", f"run.root={tmp_path}", "train.steps=3", scores=[0.9, 0.8, 0.7])
    stopping = EarlyStopping(patience=2)
    run.trainer.callbacks.append(stopping)
    run.fit()
    first = run.trainer.run.path
    run.fit()
    assert run.trainer.run.path != first
    assert stopping.since_best == 0 and run.trainer.stop_reason is None
    assert not hasattr(run.trainer, "engine"), "its weights would stay on the device"


def test_tensor_is_logged_as_a_number(make):
    class LogsTensor(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.log_metrics({"mine": outputs.losses.max(), "undefined": None})

    trainer = make(callbacks=[LogsTensor()], loggers=[JsonlLogger()]).fit()
    lines = (trainer.run.path / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    logged = [event["mine"] for event in events if "mine" in event]
    assert len(logged) == 6 and isinstance(trainer.callback_metrics["mine"], float)


def test_metric_that_is_no_number_is_named(make):
    class LogsText(Callback):
        def on_fit_start(self, trainer, module):
            trainer.log_metrics({"mine": "text"})

    with pytest.raises(ConfigError, match="log_metrics: mine='text' is no number"):
        make(callbacks=[LogsText()]).fit()


def test_state_that_json_cannot_hold_is_named_before_writing(make, tmp_path):
    class HasTensor(Callback):
        def state_dict(self):
            return {"x": torch.zeros(2)}

    with pytest.raises(CheckpointError, match=r"HasTensor\.state_dict\(\) cannot be saved.*tolist"):
        make(callbacks=[HasTensor()]).fit()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_callback_cannot_change_the_step_of_a_checkpoint(make):
    class Overwrites(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["step"] = 1

    with pytest.raises(CheckpointError, match="on_save_checkpoint set step, which a resume"):
        make(callbacks=[Overwrites()]).fit()


def test_callback_cannot_change_what_a_resume_compares(make):
    class Overwrites(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["seed"] = 99

    with pytest.raises(CheckpointError, match="on_save_checkpoint set seed, which a resume"):
        make(callbacks=[Overwrites()]).fit()


def test_failing_logger_does_not_hide_the_error_of_the_run(make, caplog):
    class Fails(JsonlLogger):
        def finalize(self, status):
            raise OSError("the disk is full")

    class Breaks(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make(callbacks=[Breaks()], loggers=[Fails()]).fit()
    assert "Fails.finalize failed: OSError: the disk is full" in caplog.text


def test_new_run_from_a_checkpoint_has_a_best_of_its_own(make, tmp_path):
    first = make("train.steps=3", scores=[0.9]).fit()
    run = make("run.dir=null", f"run.root={tmp_path}", scores=[0.6])
    run.fit(first.run.path / "checkpoints" / "step_00000003")
    assert run.trainer.run.path != first.run.path
    assert run.trainer.checkpoints.linked("best").name == "step_00000006"


def test_request_to_stop_is_withdrawn(make):
    class Hesitates(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = True
            trainer.should_stop = False

    assert make(callbacks=[Hesitates()]).fit().global_step == 6


def test_predicting_nothing_is_refused(make):
    run = make()
    with pytest.raises(DataError, match="no images: give the path"):
        run.trainer.predict(run.module, [])


def test_module_for_another_device_is_refused(make):
    run = make()
    run.module.setup(for_ipu=True)
    with pytest.raises(ModelError, match=r"this module was set up for IPUs\. Make a new one"):
        run.fit()


def test_best_of_no_run_is_refused(make):
    run = make()
    with pytest.raises(CheckpointError, match=r"this trainer has made none\. Give a path"):
        run.trainer.test(run.module, run.data, ckpt_path="best")


# Errors leave no run behind


def test_data_problem_leaves_no_run_folder_and_announces_none(make_config, tmp_path, capsys):
    root = tmp_path / "empty"
    root.mkdir()
    config = make_config(f"data.root={root}", f"run.root={tmp_path / 'runs'}")
    data = ChestXrayDataModule(config)
    with pytest.raises(DataError):
        Trainer(config).fit(ViTModule(config, data), data)
    assert not (tmp_path / "runs").exists()
    assert capsys.readouterr().out == ""


def exhaust(*_, **__):
    """Ask torch for more memory than any machine has."""
    torch.empty(2**56, dtype=torch.float32)


@pytest.mark.parametrize("method", ["compile", "train_step"])
def test_lack_of_memory_in_training_names_a_smaller_batch(make, monkeypatch, method):
    recorder = Recorder()
    run = make(callbacks=[recorder])
    monkeypatch.setattr(TorchEngine, method, exhaust)
    with pytest.raises(OutOfMemory, match=r"batch\.micro_batch_size=2 batch\.gradient_acc\w+=4\."):
        run.fit()
    assert recorder.events[-1] == ("OutOfMemory", 0)


def test_lack_of_memory_in_scoring_names_a_smaller_batch(make, monkeypatch):
    run = make()
    monkeypatch.setattr(TorchEngine, "predict", exhaust)
    with pytest.raises(OutOfMemory, match=r"Use batch\.eval_micro_batch_size=4"):
        run.trainer.validate(run.module, run.data)
