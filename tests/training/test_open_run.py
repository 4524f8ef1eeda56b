"""A run, made or found again: by its folder, its name, a checkpoint, the processes' first one."""

import os
from pathlib import Path

import pytest

from cxr_vit.config import load_config
from cxr_vit.errors import CheckpointError, ConfigError
from cxr_vit.training.run_folder import RunFolder, open_run, run_of_checkpoint

SOUND = ["model.name=vit-micro", "pipeline.layers_per_stage=[4]"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def make_run(root: Path, folder: str, *overrides: str, age: int = 0, saved: bool = True) -> Path:
    """Make what a run leaves, `age` seconds ago."""
    path = root / folder
    (path / "checkpoints").mkdir(parents=True)
    config = load_config([], [*SOUND, f"run.root={root}", *overrides])
    RunFolder(path).write_config(config)
    if saved:
        (path / "checkpoints" / "step_00000010").mkdir()
        (path / "checkpoints" / "last").symlink_to("step_00000010")
    moment = path.stat().st_mtime - age
    for changed in (path, path / "config.yaml", *path.glob("checkpoints/*"), path / "checkpoints"):
        os.utime(str(changed), (moment, moment))
    return path


# open_run


def test_new_run_is_made_from_files_and_overrides(root, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("optim: {lr: 0.5}\nrun: {name: demo}\n", encoding="utf-8")
    folder, config, _ = open_run([file], [*SOUND, f"run.root={root}", "run.seed=3"], None)
    assert folder.path.name.startswith("demo-")
    assert (config.optim.lr, config.run.seed) == (0.5, 3)


def test_new_run_with_a_broken_rule_makes_no_folder(root):
    overrides = ["model.name=vit-micro", "pipeline.layers_per_stage=[3]", f"run.root={root}"]
    with pytest.raises(ConfigError, match="places 3 layers"):
        open_run([], overrides, None)
    assert not root.exists()


def test_resume_goes_on_with_the_runs_own_config(root):
    path = make_run(root, "demo-1", "run.name=demo", "optim.lr=0.5")
    folder, config, _ = open_run([], ["run.seed=9"], str(path))
    assert folder.path == path
    assert (config.optim.lr, config.run.seed) == (0.5, 9)


def test_resume_without_a_folder_takes_run_dir(root):
    path = make_run(root, "elsewhere")
    make_run(root, "run-1")
    folder, _, _ = open_run([], [*SOUND, f"run.root={root}", f"run.dir={path}"], "")
    assert folder.path == path


def test_resume_without_a_folder_takes_the_newest_run(root):
    make_run(root, "demo-20240101-000000", age=100)
    newest = make_run(root, "demo-20240101-000200", age=10)
    make_run(root, "demo-20240101-000100", age=50)
    folder, _, _ = open_run([], [*SOUND, f"run.root={root}", "run.name=demo"], "")
    assert folder.path == newest


def test_resume_passes_over_a_newer_run_without_a_checkpoint(root):
    saved = make_run(root, "demo-20240101-000000", age=100)
    make_run(root, "demo-20240101-000100", age=1, saved=False)
    folder, _, _ = open_run([], [*SOUND, f"run.root={root}", "run.name=demo"], "")
    assert folder.path == saved


def test_resume_passes_over_a_newer_run_of_another_name(root):
    mine = make_run(root, "demo-20240101-000000", "run.name=demo", age=100)
    make_run(root, "other-20240101-000100", "run.name=other", age=1)
    folder, _, _ = open_run([], [*SOUND, f"run.root={root}", "run.name=demo"], "")
    assert folder.path == mine


def test_resume_passes_over_a_run_whose_name_begins_alike(root):
    mine = make_run(root, "demo-20240101-000000", "run.name=demo", age=100)
    make_run(root, "demo-large-20240101-000100", "run.name=demo-large", age=1)
    folder, _, _ = open_run([], [*SOUND, f"run.root={root}", "run.name=demo"], "")
    assert folder.path == mine


def test_report_on_an_older_run_does_not_make_it_the_newest(root):
    older = make_run(root, "demo-20240101-000000", age=100)
    newest = make_run(root, "demo-20240101-000100", age=50)
    (older / "report").mkdir()
    folder, _, _ = open_run([], [*SOUND, f"run.root={root}", "run.name=demo"], "")
    assert folder.path == newest


def test_nothing_to_resume_says_what_to_do(root):
    with pytest.raises(CheckpointError, match="nothing to resume") as caught:
        open_run([], [*SOUND, f"run.root={root}", "run.name=demo"], "")
    assert f"{root}/demo-*" in str(caught.value)
    assert "--resume runs/<name>" in str(caught.value)
    assert "without --resume" in str(caught.value)


def test_folder_without_a_checkpoint_says_what_to_do(root):
    path = make_run(root, "demo-1", saved=False)
    with pytest.raises(CheckpointError, match="nothing to resume") as caught:
        open_run([], [], str(path))
    assert f"{path} has no checkpoints/last" in str(caught.value)
    assert "without --resume" in str(caught.value)


def test_resumed_config_is_checked(root):
    path = make_run(root, "demo-1")
    with pytest.raises(ConfigError, match="places 3 layers"):
        open_run([], ["pipeline.layers_per_stage=[3]"], str(path))


def test_folder_without_its_config_is_refused(root):
    path = make_run(root, "demo-1")
    (path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        open_run([], [], str(path))


# run_of_checkpoint


def test_run_of_a_checkpoint_is_two_folders_above(root):
    path = make_run(root, "demo-1")
    (path / "checkpoints" / "step_00000010" / "trainer_state.json").write_text("{}")
    assert run_of_checkpoint(path / "checkpoints" / "step_00000010") == path


def test_run_of_a_link_is_that_of_the_link(root):
    path = make_run(root, "demo-1")
    (path / "checkpoints" / "step_00000010" / "trainer_state.json").write_text("{}")
    assert run_of_checkpoint(path / "checkpoints" / "last") == path


def test_run_of_a_relative_path_is_found(root, monkeypatch):
    path = make_run(root, "demo-1")
    (path / "checkpoints" / "step_00000010" / "trainer_state.json").write_text("{}")
    monkeypatch.chdir(path / "checkpoints" / "step_00000010")
    assert run_of_checkpoint(Path()).resolve() == path.resolve()


def test_absent_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder") as caught:
        run_of_checkpoint(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value)
    assert "runs/<name>/checkpoints/best" in str(caught.value)


def test_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"it has no trainer_state\.json") as caught:
        run_of_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_checkpoint_outside_a_run_is_named(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not lie in a run's folder") as caught:
        run_of_checkpoint(checkpoint)
    assert str(tmp_path / "config.yaml") in str(caught.value)


def test_a_folder_to_resume_and_a_config_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="leave --config out"):
        open_run([tmp_path / "any.yaml"], [], str(tmp_path))


# several processes


@pytest.mark.parametrize("rank", ["1", "3"])
def test_only_the_first_process_writes(root, monkeypatch, rank):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
    folder, config, _ = open_run([], [*SOUND, f"run.root={root}"], None)
    with folder:
        folder.write_config(config)
        folder.write_environment(device="IPU", data={})
    assert not root.exists()


def test_a_later_process_finds_the_run_to_resume(root, monkeypatch):
    run = make_run(root, "demo-20240101-000000", "run.name=demo")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with open_run([], [], str(run))[0] as folder:
        assert folder.path == run
        assert not (run / ".lock").exists()


def test_to_leave_the_optimizer_is_of_one_resumption(root):
    run = make_run(root, "demo-20240101-000000", "train.resume_weights_only=true")
    assert load_config([run / "config.yaml"]).train.resume_weights_only is False
