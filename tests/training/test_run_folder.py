"""A run's folder: made, found again, never written over."""

import json
from pathlib import Path

import pytest

from cxr_vit.config import Config, load_config
from cxr_vit.config.schema import RunSection
from cxr_vit.errors import ConfigError
from cxr_vit.training.run_folder import RunFolder

SOUND = ["model.name=vit-micro", "pipeline.layers_per_stage=[4]"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


# create


def test_folder_has_the_name_and_the_time(root):
    folder = RunFolder.create(RunSection(name="demo", root=str(root)))
    assert folder.path.is_dir()
    assert folder.path.parent == root
    name, _, stamp = folder.path.name.partition("-")
    assert name == "demo"
    assert stamp.replace("-", "").isdigit()


def test_two_runs_in_one_second_get_two_folders(root, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20240229-120000")
    section = RunSection(name="demo", root=str(root))
    first, second, third = (RunFolder.create(section).path for _ in range(3))
    assert first.name == "demo-20240229-120000"
    assert len({first, second, third}) == 3


def test_run_dir_names_the_folder_outright(root):
    section = RunSection(name="demo", root=str(root), dir=str(root / "a" / "b"))
    assert RunFolder.create(section).path == root / "a" / "b"
    assert (root / "a" / "b").is_dir()


def test_empty_run_dir_is_taken(tmp_path):
    assert RunFolder.create(RunSection(dir=str(tmp_path))).path == tmp_path


def test_run_dir_that_holds_something_is_refused(tmp_path):
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


# what lies in it


def test_parts_lie_in_the_folder(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.config == tmp_path / "config.yaml"
    assert folder.metrics == tmp_path / "metrics.jsonl"
    assert folder.checkpoints == tmp_path / "checkpoints"
    assert folder.tensorboard == tmp_path / "tensorboard"


def test_report_of_the_default_split_has_no_suffix(tmp_path):
    assert RunFolder(tmp_path).report("test", is_default=True) == tmp_path / "report"


def test_reports_of_two_splits_do_not_meet(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.report("val", is_default=False) != folder.report("test", is_default=True)


def test_written_config_repeats_the_run(tmp_path):
    config = load_config([], ["optim.lr=1e-5", "train.steps=7", "run.name=demo", "run.seed=3"])
    RunFolder(tmp_path).write_config(config)
    assert load_config([tmp_path / "config.yaml"]) == config


def test_written_config_leaves_the_folder_out(tmp_path):
    config = load_config([], [f"run.dir={tmp_path}", "run.seed=3"])
    RunFolder(tmp_path).write_config(config)
    again = load_config([tmp_path / "config.yaml"])
    assert again.run.dir is None
    assert again.run.seed == 3


def test_written_config_begins_with_the_command_that_repeats_it(tmp_path):
    RunFolder(tmp_path).write_config(Config())
    first_line = (tmp_path / "config.yaml").read_text(encoding="utf-8").split("\n")[0]
    assert first_line == f"# python train.py --config {tmp_path / 'config.yaml'}"


def test_written_config_leaves_nothing_else(tmp_path):
    RunFolder(tmp_path).write_config(Config())
    RunFolder(tmp_path).write_config(Config())
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_environment_has_versions_device_and_the_datas_hashes(tmp_path):
    RunFolder(tmp_path).write_environment(device="cpu (2 threads)", data={"csv_sha256": "ab12"})
    found = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert found["device"] == "cpu (2 threads)"
    assert found["csv_sha256"] == "ab12"
    assert {"torch", "transformers", "numpy"} <= set(found["versions"])
    assert {"python", "platform", "started", "git_commit"} <= set(found)


def test_empty_folder_is_discarded(tmp_path):
    folder = RunFolder.create(RunSection(dir=str(tmp_path / "run")))
    folder.discard_if_empty()
    assert not folder.path.exists()


def test_folder_that_holds_something_is_kept(tmp_path):
    folder = RunFolder.create(RunSection(dir=str(tmp_path / "run")))
    folder.write_config(Config())
    folder.discard_if_empty()
    assert folder.config.is_file()


def test_discarding_an_absent_folder_is_no_error(tmp_path):
    folder = RunFolder(tmp_path / "absent")
    folder.discard_if_empty()
    assert not folder.path.exists()


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    (tmp_path / "note").touch()
    with RunFolder(tmp_path), pytest.raises(ConfigError, match="another process"):
        RunFolder(tmp_path).__enter__()
    with RunFolder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
