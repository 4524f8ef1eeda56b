import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import cxr_vit
from cxr_vit.checkpoint_files import checkpoint_of, config_of, run_of_checkpoint
from cxr_vit.config import Config, read_config
from cxr_vit.config.schema import RunSection
from cxr_vit.engines.base import EngineState
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import CheckpointError, ConfigError
from cxr_vit.training import run_folder
from cxr_vit.training.checkpoint import CheckpointStore
from cxr_vit.training.run_folder import (
    FoundRun,
    RunFolder,
    create_run,
    find_run,
    read_run_config,
    report_folder,
)

SOUND = ["model.name=vit-micro", "pipeline.layers_per_stage=[4]"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path, writes=True)


# RunFolder.create


def test_folder_is_named_after_run_and_time(root):
    folder = RunFolder.create(RunSection(name="demo", root=str(root)))
    assert folder.path.is_dir()
    assert folder.path.parent == root
    name, _, stamp = folder.path.name.partition("-")
    assert name == "demo"
    assert stamp.replace("-", "").isdigit()


def test_two_runs_in_one_second_have_two_folders(root, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20240229-120000")
    section = RunSection(name="demo", root=str(root))
    first, second, third = (RunFolder.create(section).path for _ in range(3))
    assert first.name == "demo-20240229-120000"
    assert len({first, second, third}) == 3


def test_run_dir_is_the_folder(root):
    section = RunSection(name="demo", root=str(root), dir=str(root / "a" / "b"))
    assert RunFolder.create(section).path == root / "a" / "b"
    assert (root / "a" / "b").is_dir()


def test_empty_run_dir_is_used(tmp_path):
    assert RunFolder.create(RunSection(dir=str(tmp_path))).path == tmp_path


def test_run_dir_with_content_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not empty") as caught:
        RunFolder.create(RunSection(dir=str(tmp_path)))
    assert f"run.dir={tmp_path}" in str(caught.value)
    assert f"--resume {tmp_path}" in str(caught.value)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_run_dir_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.dir="):
        RunFolder.create(RunSection(dir=str(file)))
    assert file.read_text(encoding="utf-8") == "mine"


def test_run_dir_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.dir="):
        RunFolder.create(RunSection(dir=str(tmp_path / "file" / "run")))


def test_run_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.root="):
        RunFolder.create(RunSection(root=str(tmp_path / "file")))


# Content of the folder


def test_files_are_in_the_folder(folder, tmp_path):
    assert folder.config == tmp_path / "config.yaml"
    assert folder.checkpoints == tmp_path / "checkpoints"


def test_only_the_report_of_another_split_has_a_suffix(folder, tmp_path):
    folder.config.touch()
    checkpoint = tmp_path / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    assert report_folder(checkpoint, "test", default="test") == tmp_path / "report"
    assert report_folder(checkpoint, "val", default="test") == tmp_path / "report_val"


def test_written_config_repeats_the_run(folder):
    config = read_config([], ["optim.lr=1e-5", "train.steps=7", "run.name=demo", "run.seed=3"])
    folder.write_config(config)
    assert read_config([folder.config]) == config


def test_written_config_leaves_run_dir_out(folder, tmp_path):
    folder.write_config(read_config([], [f"run.dir={tmp_path}", "run.seed=3"]))
    again = read_config([folder.config])
    assert again.run.dir is None
    assert again.run.seed == 3


def test_written_config_leaves_resume_weights_only_out(folder):
    folder.write_config(read_config([], ["train.resume_weights_only=true"]))
    assert read_config([folder.config]).train.resume_weights_only is False


def test_written_config_begins_with_the_command_that_repeats_it(folder):
    folder.write_config(Config())
    first_line = folder.config.read_text(encoding="utf-8").split("\n")[0]
    assert first_line == f"# python train.py --config {folder.config}"


def test_written_config_leaves_no_other_file(folder, tmp_path):
    folder.write_config(Config())
    folder.write_config(Config())
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_environment_has_versions_device_engine_and_hashes(folder, tmp_path):
    facts = {"name": "torch", "device": "CPU", "precision": "fp32", "processes": 1}
    folder.write_environment("torch engine on CPU", facts, {"csv_sha256": "ab12"})
    found = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert found["device"] == "torch engine on CPU"
    assert found["engine"] == facts
    assert found["csv_sha256"] == "ab12"
    assert {"torch", "transformers", "numpy"} <= set(found["versions"])
    assert found["versions"]["cxr-vit"] == cxr_vit.__version__
    assert {"python", "platform", "started", "git_commit"} <= set(found)


@pytest.mark.parametrize("is_tracked", [True, False])
def test_commit_is_that_of_a_repository_that_tracks_the_code(tmp_path, monkeypatch, is_tracked):
    """An installed package may lie in another project's repository."""
    code = tmp_path / "site" / "run_folder.py"
    code.parent.mkdir()
    code.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "other.py").touch()
    subprocess.run([*git, "add", "." if is_tracked else "other.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], encoding="utf-8").strip()
    monkeypatch.setattr(run_folder, "__file__", str(code))
    assert run_folder.git_commit() == (head if is_tracked else None)


def test_empty_folder_is_discarded(tmp_path):
    folder = RunFolder.create(RunSection(dir=str(tmp_path / "run")))
    folder.discard_if_empty()
    assert not folder.path.exists()


def test_folder_with_content_is_kept(tmp_path):
    folder = RunFolder.create(RunSection(dir=str(tmp_path / "run")))
    folder.write_config(Config())
    folder.discard_if_empty()
    assert folder.config.is_file()


def test_discarding_an_absent_folder_is_no_error(tmp_path):
    folder = RunFolder(tmp_path / "absent", writes=True)
    folder.discard_if_empty()
    assert not folder.path.exists()


def test_run_is_locked_by_one_process_at_a_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("cxr_vit.training.run_folder._LOCK_TIMEOUT_S", 0.1)
    (tmp_path / "note").touch()
    second = RunFolder(tmp_path, writes=True)
    with folder.locked(), pytest.raises(ConfigError, match="another process"), second.locked():
        pass
    with folder.locked():
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"note", ".lock"}
    save(tmp_path, 1)
    with folder.locked():
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"note", "checkpoints"}


def test_run_that_ends_without_a_checkpoint_can_begin_again(tmp_path):
    folder = RunFolder.create(RunSection(dir=str(tmp_path / "run")))
    with folder.locked():
        folder.write_config(Config())
        (folder.path / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
    assert run_folder.is_unsaved(folder.path)
    with folder.locked():
        save(folder.path, 5)
    shutil.rmtree(str(folder.checkpoints))
    assert not run_folder.is_unsaved(folder.path), "it had a checkpoint"


def test_locked_run_without_content_is_deleted_at_the_end(tmp_path):
    folder = RunFolder.create(RunSection(dir=str(tmp_path / "run")))
    with folder.locked():
        assert folder.path.is_dir()
    assert not folder.path.exists()


def save(run: Path, step: int, **state: object) -> Path:
    """Write a checkpoint with next to no weights."""
    return CheckpointStore(run / "checkpoints").save(
        step,
        EngineState({"classifier.bias": torch.full((2,), float(step))}),
        files={},
        trainer_state={"evaluated_step": step, "best_step": None, **state},
    )


def make_run(root: Path, folder: str, *overrides: str, age: int = 0, saved: bool = True) -> Path:
    """Create the files of a run that ended `age` seconds ago."""
    path = root / folder
    (path / "checkpoints").mkdir(parents=True)
    config = read_config([], [*SOUND, f"run.root={root}", *overrides])
    RunFolder(path, writes=True).write_config(config)
    if saved:
        save(path, 10)
    moment = path.stat().st_mtime - age
    for changed in (path, path / "config.yaml", *path.glob("checkpoints/*"), path / "checkpoints"):
        os.utime(str(changed), (moment, moment))
    return path


# read_run_config: the command line


def resumed(overrides, resume, files=(), launch=None):
    """Return the folder of the run to resume, and the configuration."""
    found = read_run_config(list(files), overrides, resume, launch or Launch())
    return found.ckpt_path, found.config


def test_new_run_uses_files_and_overrides(root, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("optim: {lr: 0.5}\nrun: {name: demo}\n", encoding="utf-8")
    overrides = [*SOUND, f"run.root={root}", "run.seed=3"]
    folder, config = resumed(overrides, None, [file])
    assert folder is None
    assert (config.optim.lr, config.run.seed) == (0.5, 3)
    assert not root.exists(), "the folder is made when the run begins"


def test_new_run_with_a_broken_rule_is_refused(root):
    overrides = ["model.name=vit-micro", "pipeline.layers_per_stage=[3]", f"run.root={root}"]
    with pytest.raises(ConfigError, match="places 3 layers"):
        resumed(overrides, None)
    assert not root.exists()


def test_resume_uses_the_config_of_the_run(root):
    path = make_run(root, "demo-1", "run.name=demo", "optim.lr=0.5")
    folder, config = resumed(["run.seed=9"], str(path))
    assert folder == path
    assert (config.optim.lr, config.run.seed) == (0.5, 9)


def test_resume_without_a_folder_uses_run_dir(root):
    path = make_run(root, "elsewhere")
    make_run(root, "run-1")
    folder, _ = resumed([*SOUND, f"run.root={root}", f"run.dir={path}"], "")
    assert folder == path


def newest(root):
    return resumed([*SOUND, f"run.root={root}", "run.name=demo"], "")[0]


def test_resume_without_a_folder_uses_the_newest_run(root):
    make_run(root, "demo-20240101-000000", age=100)
    expected = make_run(root, "demo-20240101-000200", age=10)
    make_run(root, "demo-20240101-000100", age=50)
    assert newest(root) == expected


def test_clock_that_is_set_back_does_not_change_the_order_of_runs(root, monkeypatch):
    section = RunSection(name="demo", root=str(root))
    names = []
    for moment in ("20240229-120000", "20240229-110000", "20230101-000000"):
        monkeypatch.setattr("time.strftime", lambda *_, moment=moment: moment)
        names.append(RunFolder.create(section).path.name)
    assert names == ["demo-20240229-120000", "demo-20240229-120000-2", "demo-20240229-120000-3"]
    monkeypatch.undo()
    for name in names:
        save(root / name, 10)
        (root / name / "config.yaml").touch()
    assert newest(root).name == names[-1]


def test_tenth_run_of_a_second_is_newer_than_the_ninth(root):
    for count in (2, 9, 10):
        save(root / f"demo-20240101-000000-{count}", 10)
        (root / f"demo-20240101-000000-{count}" / "config.yaml").touch()
    assert find(RunSection(root=str(root), name="demo"), "last", Launch()).folder.path.name == (
        "demo-20240101-000000-10"
    )


def test_resume_skips_a_newer_run_without_a_checkpoint(root):
    saved = make_run(root, "demo-20240101-000000", age=100)
    make_run(root, "demo-20240101-000100", age=1, saved=False)
    assert newest(root) == saved


def test_resume_skips_a_newer_run_of_another_name(root):
    mine = make_run(root, "demo-20240101-000000", "run.name=demo", age=100)
    make_run(root, "other-20240101-000100", "run.name=other", age=1)
    assert newest(root) == mine


def test_resume_skips_a_run_with_a_longer_name(root):
    mine = make_run(root, "demo-20240101-000000", "run.name=demo", age=100)
    make_run(root, "demo-large-20240101-000100", "run.name=demo-large", age=1)
    assert newest(root) == mine


def test_report_of_an_older_run_does_not_make_it_the_newest(root):
    older = make_run(root, "demo-20240101-000000", age=100)
    expected = make_run(root, "demo-20240101-000100", age=50)
    (older / "report").mkdir()
    assert newest(root) == expected


def test_error_without_a_run_to_resume_has_advice(root):
    with pytest.raises(CheckpointError, match="nothing to resume") as caught:
        newest(root)
    assert f"{root}/demo-*" in str(caught.value)
    assert "--resume runs/<name>" in str(caught.value)
    assert "without --resume" in str(caught.value)


def test_run_without_a_checkpoint_begins_again_in_its_folder(root):
    path = make_run(root, "demo-1", "optim.lr=0.5", saved=False)
    found = read_run_config([], [], str(path), Launch())
    assert (found.ckpt_path, found.checkpoint, found.config.optim.lr) == (path, None, 0.5)
    run = find(RunSection(), path)
    assert (run.folder.path, run.checkpoint) == (path, None)


def test_newest_run_without_a_checkpoint_begins_again_if_no_run_has_one(root):
    make_run(root, "demo-20240101-000000", saved=False)
    expected = make_run(root, "demo-20240101-000100", saved=False)
    assert newest(root) == expected


def test_run_that_was_killed_before_its_configuration_says_how_to_start_it(root):
    path = make_run(root, "demo-1", saved=False)
    (path / "config.yaml").unlink()
    (path / ".lock").write_text('{"host": "gone", "pid": 1, "started": "5"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"Start the run again .* run.dir={path}"):
        resumed([], str(path))


@pytest.mark.parametrize("content", ["config.yaml", "notes.txt"])
def test_folder_of_something_else_is_not_begun_again(tmp_path, content):
    (tmp_path / content).write_text("optim: {lr: 1}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not empty"):
        RunFolder.create(RunSection(dir=str(tmp_path)))
    with pytest.raises(CheckpointError, match="it has no checkpoint"):
        find(RunSection(), tmp_path)


def test_run_dir_without_a_checkpoint_is_begun_again(root, caplog):
    path = make_run(root, "demo-1", saved=False)
    assert RunFolder.create(RunSection(dir=str(path))).path == path
    assert f"{path} was begun and has no checkpoint: beginning it again" in caplog.text


def test_a_checkpoint_can_be_resumed(root):
    run = make_run(root, "demo-1", "optim.lr=0.5")
    step = run / "checkpoints" / "step_00000010"
    found = read_run_config([], ["run.seed=9"], str(step), Launch())
    assert found[1:] == (step, step)
    assert (found.config.optim.lr, found.config.run.seed) == (0.5, 9)


def test_error_for_a_folder_without_a_checkpoint_has_advice(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume") as caught:
        resumed([], str(tmp_path))
    assert f"{tmp_path}: it has no checkpoint" in str(caught.value)
    assert "without --resume" in str(caught.value)


def test_resumed_config_is_checked(root):
    path = make_run(root, "demo-1")
    with pytest.raises(ConfigError, match="places 3 layers"):
        resumed(["pipeline.layers_per_stage=[3]"], str(path))


def test_folder_without_its_config_is_refused(root):
    path = make_run(root, "demo-1")
    (path / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.yaml"):
        resumed([], str(path))


def test_resume_of_a_folder_refuses_a_config(tmp_path):
    with pytest.raises(ConfigError, match="leave --config out"):
        resumed([], str(tmp_path), [tmp_path / "any.yaml"])


# find_run: ckpt_path of Trainer.fit


def find(run, ckpt_path, launch=None):
    with contextlib.ExitStack() as stack:
        return find_run(run, ckpt_path, launch or Launch(), stack)


def step_folder(run, step=10):
    return run / "checkpoints" / f"step_{step:08d}"


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_newest_whole_checkpoint_is_taken_and_others_are_named(root, caplog):
    path = make_run(root, "demo-1")
    save(path, 20)
    save(path, 30)
    damage(step_folder(path, 30) / "model.safetensors")
    (step_folder(path, 20) / "optimizer.safetensors").unlink()
    assert find(RunSection(), path).checkpoint == step_folder(path)
    words = "passing over a checkpoint: "
    assert f"{words}{step_folder(path, 30)}/model.safetensors is damaged" in caplog.text
    assert f"{words}{step_folder(path, 20)}/optimizer.safetensors is missing" in caplog.text
    assert f"resuming from {step_folder(path)}" in caplog.text


def test_run_whose_checkpoints_are_all_damaged_is_refused(root):
    path = make_run(root, "demo-1")
    damage(step_folder(path) / "trainer_state.json")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.\n.*trainer_state.json"):
        find(RunSection(), path)
    assert not run_folder.is_unsaved(path), "it has trained: it is never begun again"


def test_checkpoint_of_a_newer_version_is_not_passed_over(root):
    path = make_run(root, "demo-1")
    (step_folder(path) / "trainer_state.json").write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="format 99 is of a newer version"):
        find(RunSection(), path)


def test_links_are_not_needed_to_resume(root):
    path = make_run(root, "demo-1")
    save(path, 20)
    (path / "checkpoints" / "last").unlink()
    assert find(RunSection(), path).checkpoint == step_folder(path, 20)


def test_step_decides_which_checkpoint_is_the_newest(root):
    path = make_run(root, "demo-1")
    save(path, 9)
    os.utime(str(step_folder(path, 9)), (2**31, 2**31))
    assert find(RunSection(), path).checkpoint == step_folder(path)


def test_no_path_is_a_new_run(root):
    make_run(root, "run-20240101-000000")
    assert find(RunSection(root=str(root)), None, Launch()) == FoundRun(None, None)


def test_new_run_in_a_folder_with_content_is_refused(root):
    path = make_run(root, "mine")
    with pytest.raises(ConfigError, match="is not empty"):
        find(RunSection(dir=str(path)), None, Launch())


def test_last_is_the_newest_run(root):
    make_run(root, "demo-20240101-000000")
    path = make_run(root, "demo-20240101-000100")
    found = find(RunSection(root=str(root), name="demo"), "last", Launch())
    assert (found.folder.path, found.checkpoint) == (path, step_folder(path))
    assert not found.restarted


def test_last_is_run_dir_where_it_is_given(root):
    path = make_run(root, "elsewhere")
    make_run(root, "run-20240101-000100")
    section = RunSection(root=str(root), dir=str(path))
    assert find(section, "last").folder.path == path


@pytest.mark.parametrize("kind", [str, Path])
def test_folder_of_a_run_is_that_run(root, kind):
    path = make_run(root, "demo-1")
    found = find(RunSection(root=str(root)), kind(path), Launch())
    assert (found.folder.path, found.checkpoint) == (path, step_folder(path))


def test_another_checkpoint_begins_a_new_run(root):
    path = make_run(root, "demo-1") / "checkpoints" / "step_00000010"
    found = find(RunSection(root=str(root)), path, Launch())
    assert (found.folder, found.checkpoint) == (None, path)


def test_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="it has no checkpoint"):
        find(RunSection(), tmp_path)


# checkpoint_of and run_of_checkpoint


def saved_run(root, *links):
    path = make_run(root, "demo-1")
    for link in links:
        (path / "checkpoints" / link).symlink_to("step_00000010")
    return path


def test_checkpoint_of_a_checkpoint_is_itself(root):
    path = saved_run(root) / "checkpoints" / "step_00000010"
    assert checkpoint_of(path) == path


def test_checkpoint_of_a_run_is_its_best(root):
    path = saved_run(root, "best")
    assert checkpoint_of(path) == path / "checkpoints" / "best"


def test_best_by_the_newest_state_wins_over_a_link_of_before(root):
    # A process can be killed between saving the best checkpoint and linking it.
    path = saved_run(root, "best")
    save(path, 20, best_step=20)
    assert checkpoint_of(path) == step_folder(path, 20)


@pytest.mark.parametrize("name", ["best", "last"])
def test_lost_links_are_found_by_the_states(root, name):
    path = make_run(root, "demo-1")
    save(path, 20, best_step=10)
    (path / "checkpoints" / "last").unlink()
    assert checkpoint_of(path) == step_folder(path)
    expected = step_folder(path, 10 if name == "best" else 20)
    assert checkpoint_of(path / "checkpoints" / name) == expected


def test_text_file_names_a_checkpoint_where_links_are_lost(root):
    path = make_run(root, "demo-1")
    save(path, 20)
    for name, step in (("last", 20), ("best", 10)):
        (path / "checkpoints" / name).unlink(missing_ok=True)
        (path / "checkpoints" / name).write_text(f"step_{step:08d}\n", encoding="utf-8")
    assert checkpoint_of(path) == step_folder(path)
    assert checkpoint_of(path / "checkpoints" / "last") == step_folder(path, 20)


@pytest.mark.parametrize("text", ["../../../etc", "step_1", "", "step_00000010/../../x", "\0"])
def test_text_file_names_nothing_outside(root, text):
    path = make_run(root, "demo-1")
    (path / "checkpoints" / "best").write_text(text, encoding="utf-8")
    assert checkpoint_of(path) == path / "checkpoints" / "last"


def test_checkpoint_of_a_run_without_validation_is_its_last(root):
    path = saved_run(root)
    assert checkpoint_of(path) == path / "checkpoints" / "last"


def test_file_of_a_checkpoint_names_its_folder(root):
    file = saved_run(root) / "checkpoints" / "last" / "trainer_state.json"
    with pytest.raises(CheckpointError, match=f"it is a file.* Use {file.parent}"):
        checkpoint_of(file)


def test_other_file_is_refused(tmp_path):
    (tmp_path / "weights.pt").touch()
    with pytest.raises(CheckpointError, match=r"weights\.pt is not a checkpoint: it is a file"):
        checkpoint_of(tmp_path / "weights.pt")


def test_run_without_a_checkpoint_is_refused(root):
    path = make_run(root, "demo-1", saved=False)
    with pytest.raises(CheckpointError, match="this run has saved none yet"):
        checkpoint_of(path)


def test_run_of_a_checkpoint_is_two_folders_above(root):
    path = make_run(root, "demo-1")
    assert run_of_checkpoint(path / "checkpoints" / "step_00000010") == path


def test_run_of_a_link_is_two_folders_above_the_link(root):
    path = make_run(root, "demo-1")
    assert run_of_checkpoint(path / "checkpoints" / "last") == path


def test_run_of_a_relative_path_is_found(root, monkeypatch):
    path = make_run(root, "demo-1")
    monkeypatch.chdir(path / "checkpoints" / "step_00000010")
    assert run_of_checkpoint(Path()).resolve() == path.resolve()


def test_error_names_an_absent_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder") as caught:
        checkpoint_of(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value)
    assert "runs/<name>/checkpoints/best" in str(caught.value)


def test_error_names_a_folder_that_is_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"it has no trainer_state\.json") as caught:
        checkpoint_of(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_checkpoint_that_was_copied_alone_brings_its_configuration(root, tmp_path):
    checkpoint = tmp_path / "a" / "copied"
    checkpoint.mkdir(parents=True)
    assert run_of_checkpoint(checkpoint) is None
    with pytest.raises(CheckpointError, match=r"has no config\.yaml and is not in a run's folder"):
        config_of(checkpoint)
    (checkpoint / "config.yaml").touch()
    assert config_of(checkpoint) == checkpoint / "config.yaml"
    assert report_folder(checkpoint, "test", default="test") == checkpoint / "report"


# Several processes


@pytest.mark.parametrize("rank", [1, 3])
def test_only_the_main_process_writes(root, rank):
    launch = Launch(rank=rank, world_size=4, launcher="poprun")
    folder = create_run(RunSection(root=str(root)), launch)
    with folder.locked():
        folder.write_config(Config())
        folder.write_environment("IPU", {}, {})
    assert not root.exists()


def test_main_process_of_several_creates_the_run(root):
    launch = Launch(rank=0, world_size=4, launcher="poprun")
    assert create_run(RunSection(root=str(root)), launch).path.is_dir()


def test_other_process_finds_the_run_to_resume(root):
    run = make_run(root, "demo-20240101-000000", "run.name=demo")
    launch = Launch(rank=1, world_size=2, launcher="poprun")
    folder = find(RunSection(), run, launch).folder
    with folder.locked():
        assert folder.path == run
        assert not (run / ".lock").exists()


def test_error_for_what_is_no_run_says_what_it_is(root, tmp_path):
    path = make_run(root, "demo-1")
    cases = {
        path / "config.yaml": "it is a file",
        tmp_path / "absent": "there is no such folder",
    }
    for given, words in cases.items():
        with pytest.raises(CheckpointError, match=re.escape(f"{given}: {words}")):
            resumed([], str(given))
