"""What a run does on a full disk, at a signal, and after a kill between saving and linking."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SMALL
from cxr_vit import Callback, ChestXrayDataModule, JsonlLogger, ViTModule, checkpoint_files
from cxr_vit.checkpoint_files import checkpoint_of, read_state, verify_checkpoint
from cxr_vit.commands import evaluate
from cxr_vit.config import load_config
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import CheckpointError, ConfigError
from cxr_vit.training import checkpoint as store_module
from cxr_vit.training.checkpoint import CheckpointStore
from cxr_vit.training.run_folder import read_run_config
from runs import AtStart, Recorder, Run, StopAt, assert_same_state, last_state

EVERY_STEP = ["train.checkpoint_every_steps=1", "train.eval_every_steps=3"]


class FullDisk:
    """Lets the writing of the optimizer's state fail at some of the saves, counted from 1."""

    def __init__(self, monkeypatch, *failing):
        self.saves = 0
        self.failing = failing
        self.write = store_module.save_file
        monkeypatch.setattr(store_module, "save_file", self)

    def __call__(self, tensors, path, **settings):
        if path.endswith("model.safetensors"):
            self.saves += 1
        if path.endswith("optimizer.safetensors") and self.saves in self.failing:
            raise OSError(28, "No space left on device", path)
        self.write(tensors, path, **settings)


def steps(trainer):
    return [path.name for path in trainer.checkpoints.steps()]


# Full disks


def test_failed_save_is_told_and_tried_again(make, monkeypatch, caplog):
    expected = last_state(make(*EVERY_STEP, folder="undisturbed").fit())
    FullDisk(monkeypatch, 2)
    recorder = Recorder()
    trainer = make(*EVERY_STEP, "train.keep_last=9", callbacks=[recorder]).fit()
    (line,) = [record.getMessage() for record in caplog.records if "cannot be" in record.message]
    assert line.startswith("the checkpoint of step 2 cannot be written: [Errno 28] No space left")
    assert "The last checkpoint is " in line
    assert "step_00000001" in line
    assert steps(trainer) == [f"step_{step:08d}" for step in (1, 3, 4, 5, 6)]
    assert not list(trainer.checkpoints.folder.glob(".*")), "what was written is removed"
    assert recorder.of("checkpoint") == [1, 2, 3, 4, 5, 6], "one attempt per interval"
    assert_same_state(last_state(trainer)[0], expected[0])


def test_failed_save_is_not_repeated_before_the_next_interval(make, monkeypatch):
    FullDisk(monkeypatch, 1)
    recorder = Recorder()
    make("train.checkpoint_every_steps=2", "train.eval_every_steps=6", callbacks=[recorder]).fit()
    assert recorder.of("checkpoint") == [2, 4, 6]


def test_best_checkpoint_that_is_not_written_is_not_the_best(make, monkeypatch):
    FullDisk(monkeypatch, 1)
    trainer = make(scores=[0.9, 0.6]).fit()
    assert trainer.checkpoints.linked("best").name == "step_00000006"
    assert read_state(trainer.checkpoints.folder / "last")["best_score"] == 0.6


def test_run_whose_last_save_fails_ends_with_an_error_and_resumes(make, monkeypatch):
    expected = last_state(make(folder="undisturbed").fit())
    with monkeypatch.context() as context:
        FullDisk(context, 2, 3)
        with pytest.raises(CheckpointError, match=r"of step 6, cannot be written.*--resume"):
            make().fit()
    resumed = make().resume()
    assert_same_state(last_state(resumed)[0], expected[0])


def test_last_save_is_tried_twice(make, monkeypatch):
    FullDisk(monkeypatch, 2)
    assert steps(make().fit()) == ["step_00000003", "step_00000006"]


# Interruptions


@pytest.fixture(autouse=True)
def terminal():
    """Signals work as in a terminal, also where the tests run under nohup or in the background."""
    defaults = ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL))
    before = [(number, signal.signal(number, handler)) for number, handler in defaults]
    yield
    for number, handler in before:
        signal.signal(number, handler)


class Signals(Callback):
    """Sends this process a signal within a hook, once."""

    def __init__(self, number, hook):
        self.number = number
        setattr(self, hook, self.send)

    def send(self, trainer, *arguments):
        if self.number and trainer.is_fitting and trainer.global_step >= 3:
            os.kill(os.getpid(), self.number)
            self.number = None


@pytest.fixture(scope="module")
def undisturbed(sample_root, tmp_path_factory):
    """The last state of a run with validation scores of 0.5 and 0.6 that no signal reaches."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    config = load_config([], [*SMALL, f"data.root={sample_root}", f"run.dir={folder}"])
    return last_state(Run(config, [0.5, 0.6], (), ()).fit())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_start"])
def test_signal_saves_and_the_resumed_run_is_the_same(make, undisturbed, name, hook):
    scores, expected = [0.5, 0.6], undisturbed
    signals = Signals(getattr(signal, name), hook)
    interrupted = make(callbacks=[signals], scores=scores).fit()
    assert interrupted.interrupted
    assert interrupted.stop_reason == f"{name} received"
    assert (interrupted.global_step, interrupted.evaluated_step) == (3, 0)
    recorder = Recorder()
    resumed = make(callbacks=[recorder], scores=scores).resume()
    assert recorder.of("validation") == [3, 6], "the validation is repeated"
    assert_same_state(last_state(resumed)[0], expected[0])
    assert last_state(resumed)[1]["best_score"] == expected[1]["best_score"]


def test_ignored_signal_stays_ignored(make):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        trainer = make(callbacks=[Signals(signal.SIGHUP, "on_train_batch_end")]).fit()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.is_complete


def test_run_ends_after_its_minutes_and_goes_on(make, monkeypatch):
    run = make("train.max_minutes=5")
    now = time.monotonic()

    class Later(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if outputs.step == 2:
                monkeypatch.setattr(time, "monotonic", lambda: now + 301)

    run.trainer.callbacks.append(Later())
    run.trainer._has_extensions = True
    trainer = run.fit()
    monkeypatch.undo()
    assert trainer.interrupted
    assert trainer.describe_end().startswith("stopped at step 2: train.max_minutes=5 are over")
    assert make("train.max_minutes=5").resume().is_complete


# Kills between saving and linking


def test_best_link_that_was_not_made_is_made_on_resume(make):
    first = make("train.steps=3", scores=[0.7]).fit()
    (first.checkpoints.folder / "best").unlink()
    (first.checkpoints.folder / "last").unlink()
    resumed = make(scores=[0.6]).resume()
    assert resumed.checkpoints.linked("best").name == "step_00000003"
    assert resumed.checkpoints.linked("last").name == "step_00000006"


def test_finished_run_gets_its_links_back(make):
    folder = make().fit().checkpoints.folder
    for name in ("best", "last"):
        (folder / name).unlink()
    make().resume()
    assert (folder / "best").resolve().name == "step_00000003"
    assert (folder / "last").resolve().name == "step_00000006"


def test_damaged_checkpoint_is_passed_over_and_kept(make, caplog):
    undisturbed = make(*EVERY_STEP, folder="undisturbed", scores=[0.5, 0.6]).fit()
    run = make(*EVERY_STEP, "train.keep_last=9", scores=[0.5], callbacks=[StopAt(5)])
    folder = run.fit().checkpoints.folder
    damaged = (folder / "step_00000005" / "model.safetensors").read_bytes()[:-1] + b"x"
    (folder / "step_00000005" / "model.safetensors").write_bytes(damaged)
    resumed = make(*EVERY_STEP, "train.keep_last=9", scores=[0.6]).resume()
    assert "passing over a checkpoint: " in caplog.text
    assert f"resuming from {folder / 'step_00000004'}" in caplog.text
    assert_same_state(last_state(resumed)[0], last_state(undisturbed)[0])
    assert (folder / "step_00000005.damaged" / "model.safetensors").read_bytes() == damaged
    verify_checkpoint(folder / "step_00000005")


def test_run_goes_on_where_links_cannot_be_made(make, monkeypatch, tmp_path):
    def refuse(*arguments, **named):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    expected = last_state(make(folder="undisturbed", scores=[0.7, 0.6]).fit())
    stopped = make(scores=[0.7], callbacks=[StopAt(4)]).fit()
    assert (stopped.checkpoints.folder / "last").read_text() == "step_00000004\n"
    resumed = make(scores=[0.6]).resume()
    assert (resumed.checkpoints.folder / "best").read_text() == "step_00000003\n"
    assert_same_state(last_state(resumed)[0], expected[0])
    out = tmp_path / "report"
    assert evaluate.main(["--checkpoint", str(resumed.run.path), "--out", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text())["step"] == 3


# Other folders


def test_run_begins_again_in_the_folder_of_one_without_a_checkpoint(make):
    class Killed(Exception):
        pass

    def die(trainer):
        if trainer.run.config.exists():
            raise Killed

    with pytest.raises(Killed):
        make(callbacks=[AtStart(die)]).fit()
    folder = make(loggers=[JsonlLogger()]).fit().run.path
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 0


def test_checkpoint_that_was_copied_alone_is_scored(make, tmp_path):
    trainer = make(scores=[0.5]).fit()
    copy = tmp_path / "elsewhere" / "model"
    shutil.copytree(str(trainer.checkpoints.folder / "best"), str(copy))
    shutil.rmtree(str(trainer.run.path))
    assert evaluate.main(["--checkpoint", str(copy)]) == 0
    assert json.loads((copy / "report" / "metrics.json").read_text())["step"] == 3
    assert ViTModule.load_from_checkpoint(copy).names


def test_checkpoint_is_resumed_in_a_run_of_its_own(make, make_config, tmp_path, capsys):
    first = make(*EVERY_STEP, "train.keep_last=9").fit()
    content = {path: path.stat().st_mtime_ns for path in first.run.path.rglob("*")}
    step = first.checkpoints.folder / "step_00000004"
    second = make(*EVERY_STEP, folder="second").fit(step)
    assert f"continues {step} in a folder of its own" in capsys.readouterr().out
    assert_same_state(last_state(second)[0], last_state(first)[0])
    assert content == {path: path.stat().st_mtime_ns for path in first.run.path.rglob("*")}


def test_weights_of_a_damaged_checkpoint_are_not_trained_from(make, make_config):
    trainer = make("train.steps=3").fit()
    file = trainer.checkpoints.folder / "last" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    config = make_config(f"model.name={file.parent}")
    with pytest.raises(CheckpointError, match="is damaged"):
        ViTModule(config, ChestXrayDataModule(config))
    with pytest.raises(CheckpointError, match="is damaged"):
        trainer.validate(trainer.module, trainer.datamodule, "last")


def test_state_of_a_built_in_callback_is_checked(make):
    path = make("train.steps=3").fit().checkpoints.folder / "last" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["callbacks"]["early_stopping"]["since_best"] = "1"
    state["format"] = 2
    del state["digest"]
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state of early_stopping is wrong: since_best"):
        make().resume()


def test_best_is_kept_in_a_relative_folder_without_links(make_config, tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    monkeypatch.chdir(tmp_path)
    config = make_config(
        "run.dir=run", *EVERY_STEP, "train.eval_every_steps=1", "train.keep_last=1"
    )
    trainer = Run(config, [0.9, 0.5, 0.4, 0.3, 0.2, 0.1], (), ()).fit()
    assert steps(trainer) == ["step_00000001", "step_00000006"]
    assert checkpoint_of(trainer.run.path).name == "step_00000001"


def test_copy_with_links_followed_keeps_its_best(make, tmp_path):
    trainer = make(scores=[0.9], callbacks=[StopAt(4)]).fit()
    folder, copy = trainer.checkpoints.folder, tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    for name in ("last", "best"):
        shutil.copytree(str(folder / name), str(copy / "checkpoints" / name))
    shutil.copy(str(trainer.run.config), str(copy))
    resumed = make(scores=[0.5], folder="copy").resume()
    assert read_state(checkpoint_of(resumed.run.path))["step"] == 3


def test_best_score_of_a_last_step_that_is_saved_at_the_second_attempt(make, monkeypatch):
    FullDisk(monkeypatch, 2)
    trainer = make(scores=[0.5, 0.9]).fit()
    assert trainer.checkpoints.linked("best").name == "step_00000006"
    assert last_state(trainer)[1]["best_score"] == 0.9


@pytest.mark.parametrize("method", ["prune", "link"])
def test_error_after_the_save_does_not_undo_it(make, monkeypatch, caplog, method):
    def fail(store, *arguments):
        if arguments[0] != "last" and len(store.steps()) == 2:
            raise OSError(39, "Directory not empty")
        return original(store, *arguments)

    original = getattr(CheckpointStore, method)
    monkeypatch.setattr(CheckpointStore, method, fail)
    trainer = make(scores=[0.5, 0.9]).fit()
    assert "step_00000006 is saved, but: [Errno 39] Directory not empty" in caplog.text
    assert checkpoint_of(trainer.run.path).resolve().name == "step_00000006"


def test_score_that_is_not_a_number_is_undefined(make):
    trainer = make(scores=[float("nan"), 0.5]).fit()
    assert last_state(trainer)[1]["best_score"] == 0.5


def test_run_whose_checkpoints_were_deleted_is_not_begun_again(make):
    trainer = make(loggers=[JsonlLogger()]).fit()
    shutil.rmtree(str(trainer.checkpoints.folder))
    metrics = (trainer.run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="is not empty"):
        make().fit()
    with pytest.raises(CheckpointError, match="it has metrics and no checkpoint"):
        make().resume()
    trainer.checkpoints.folder.symlink_to("/mnt/absent")
    with pytest.raises(CheckpointError, match="a link that leads nowhere"):
        make().resume()
    assert (trainer.run.path / "metrics.jsonl").read_bytes() == metrics


def test_checkpoints_of_another_run_are_not_written(make):
    folder = make().fit().checkpoints.folder
    other = make("train.steps=3", folder="other").fit().run.path
    shutil.rmtree(str(other / "checkpoints"))
    (other / "checkpoints").symlink_to(folder)
    with pytest.raises(CheckpointError, match=f"a link to those of another run, {folder.parent}"):
        make(folder="other").resume()
    assert len(list(folder.glob("step_*"))) == 2


def test_step_folder_without_its_state_is_no_run(make):
    step = make().fit().checkpoints.folder / "step_00000006"
    (step / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"this checkpoint has no trainer_state\.json"):
        make(folder="other").fit(step)


def test_what_is_resumed_is_found_under_the_lock(make, monkeypatch):
    first = make(callbacks=[StopAt(3)]).fit()
    late = make().trainer  # the process that still saves
    path = first.checkpoints.folder / "step_00000003"
    hidden = path.with_name(".late")
    os.replace(path, hidden)

    @contextlib.contextmanager
    def wait_for_the_other(folder):
        os.replace(hidden, path)
        yield

    monkeypatch.setattr("cxr_vit.training.run_folder.RunFolder.locked", wait_for_the_other)
    (first.run.path / ".lock").write_text('{"host": "x", "pid": 1, "started": "1"}')
    recorder = Recorder()
    assert make(callbacks=[recorder]).resume().is_complete
    assert recorder.of("step") == [4, 5, 6]
    assert not list(path.parent.glob("*.damaged"))
    assert late.global_step == 0


def test_new_run_is_not_begun_over_one_that_was_saved_meanwhile(make, monkeypatch):
    first = make("train.steps=3").fit()
    hidden = first.run.path.with_name("late")
    os.replace(first.checkpoints.folder, hidden)
    (first.run.path / ".lock").write_text('{"host": "x", "pid": 1, "started": "1"}')

    @contextlib.contextmanager
    def wait_for_the_other(folder):
        os.replace(hidden, first.checkpoints.folder)
        yield

    monkeypatch.setattr("cxr_vit.training.run_folder.RunFolder.locked", wait_for_the_other)
    config = first.run.config.read_bytes()
    with pytest.raises(ConfigError, match="is not empty"):
        make("optim.lr=0.5").fit()
    assert first.run.config.read_bytes() == config


def test_file_system_error_is_no_damage(make, monkeypatch):
    folder = make().fit().checkpoints.folder
    checkpoint_files._verified.clear()

    def stale(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(checkpoint_files, "sha256", stale)
    with pytest.raises(CheckpointError, match=r"cannot be read: Stale file handle. Nothing was"):
        make().resume()
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000003", "step_00000006"]


@pytest.mark.parametrize("name", ["last", "best", "checkpoints"])
def test_names_of_a_run_can_be_resumed(make, name):
    folder = make("train.steps=3", scores=[0.5]).fit().checkpoints.folder
    if name == "checkpoints":
        assert make(scores=[0.6]).fit(folder).run.path == folder.parent
        return
    (folder / name).unlink()
    (folder / name).write_text("step_00000003\n")
    trainer = make(folder="other").fit(folder / name)
    assert trainer.is_complete


@pytest.mark.parametrize("name", ["last", "best"])
def test_links_in_a_circle_are_lost_links(make, name):
    folder = make(scores=[0.7]).fit().checkpoints.folder
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    assert checkpoint_of(folder.parent).is_dir()
    make().resume()
    assert (folder / name).exists()


def test_configuration_of_the_checkpoint_is_used_where_the_run_has_lost_its_own(make, caplog):
    run = make().fit().run
    run.config.unlink()
    found = read_run_config([], [], str(run.path), Launch())
    assert found.config.model.name == "vit-micro"
    assert f"{run.config} is missing: using that of" in caplog.text


def test_named_checkpoint_is_verified_before_its_configuration_is_read(make):
    step = make().fit().checkpoints.folder / "step_00000006"
    (step / "config.yaml").write_text("nonsense: 1\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged"):
        read_run_config([], [], str(step), Launch())


def test_named_pipe_in_a_run_does_not_block(tmp_path):
    os.mkfifo(str(tmp_path / "config.yaml"))
    with pytest.raises(CheckpointError, match="it has no checkpoint"):
        read_run_config([], [], str(tmp_path), Launch())


def test_link_in_place_of_the_lock_is_not_followed(make, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = make("train.steps=3").fit().run.path
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(ConfigError, match=r"cannot be written: \.lock: "):
        make().resume()
    assert victim.read_text() == "mine"


def test_removed_lock_is_no_error_at_the_end(make):
    trainer = make(callbacks=[AtStart(lambda trainer: (trainer.run.path / ".lock").unlink())]).fit()
    assert trainer.is_complete


def test_checkpoint_below_the_root_is_scored(monkeypatch):
    assert checkpoint_files.run_of_checkpoint(Path("/model")) is None


TERMINAL = """
import os, pty, signal, sys, time
master, slave = pty.openpty()
pid = os.fork()
if pid == 0:
    os.setsid()
    import fcntl, termios
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(slave, descriptor)
    os.close(master)
    os.execv(sys.executable, [sys.executable, "train.py", *sys.argv[1:]])
os.close(slave)
log = os.path.join(os.environ["RUN"], "metrics.jsonl")
while not (os.path.exists(log) and "train/loss" in open(log).read()):
    os.read(master, 1000)  # fails if the process ends
os.close(master)  # the window is closed
_, status = os.waitpid(pid, 0)
print(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status))
"""


def test_closed_terminal_saves_the_run(repository, small_overrides, tmp_path):
    run = tmp_path / "run"
    words = [*small_overrides, "train.steps=4000", "train.log_every_steps=1", f"run.dir={run}"]
    command = [sys.executable, "-c", TERMINAL, "--config", "configs/vit_demo.yaml", *words]
    environment = {**os.environ, "RUN": str(run)}
    done = subprocess.run(
        command, cwd=str(repository), env=environment, stdout=subprocess.PIPE, timeout=200
    )
    assert done.stdout == b"75\n"
    assert checkpoint_files.newest_whole(run).checkpoint is not None
