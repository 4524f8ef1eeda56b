import contextlib
import csv
import json
import logging
import os
import re
import resource
import shutil
import struct
import subprocess
import threading
import time
from importlib.util import find_spec

import pandas as pd
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from cxr_vit.config.fields import _expand
from cxr_vit.config.schema import SECTIONS, Config
from cxr_vit.errors import ConfigError
from cxr_vit.training import log_files, loggers
from cxr_vit.training.loggers import (
    BUILT_IN,
    CsvLogger,
    JsonlLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
    changed_settings,
)


def needs(package):
    reason = f'{package} is not installed: pip install "cxr-vit[loggers]"'
    return pytest.mark.skipif(find_spec(package) is None, reason=reason)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "vit_demo-20250101"
    folder.mkdir()
    (folder / "config.yaml").write_text("optim: {lr: 0.1}\n")
    return folder


def figure():
    drawn = Figure(figsize=(1, 1))
    drawn.subplots().plot([0, 1], [0, 1])
    return drawn


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# All loggers


@pytest.mark.parametrize("name", BUILT_IN)
def test_logger_that_was_never_opened_is_closed(name):
    if name in ("wandb", "mlflow") and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    BUILT_IN[name]().finalize("failed")


def fit_twice(logger, runs):
    for number, folder in enumerate(runs):
        logger.setup(folder, 0)
        logger.log_hyperparams({"optim.lr": 0.1})
        logger.log_metrics({"train/loss": 0.5, f"mine/{number}": 1.0}, 1)
        logger.log_metrics({"val/loss": 0.25}, 2)
        logger.log_figures({"val/roc": figure()}, 2)
        logger.finalize("success")


@pytest.fixture
def two_runs(run):
    second = run.parent / "vit_demo-20250102"
    second.mkdir()
    return [run, second]


def test_jsonl_logs_two_fits(two_runs):
    fit_twice(JsonlLogger(), two_runs)
    for number, folder in enumerate(two_runs):
        assert events(folder)[0] == {"step": 1, "train/loss": 0.5, f"mine/{number}": 1.0}
        assert len(events(folder)) == 2


def test_csv_logs_two_fits(two_runs):
    fit_twice(CsvLogger(), two_runs)
    for number, folder in enumerate(two_runs):
        header = (folder / "metrics.csv").read_text().splitlines()[0]
        assert header == f"step,train/loss,mine/{number},val/loss"


def test_tensorboard_logs_two_fits(two_runs):
    fit_twice(TensorBoardLogger(), two_runs)
    for number, folder in enumerate(two_runs):
        board = EventAccumulator(str(folder)).Reload()
        tags = {tag for tag in board.Tags()["scalars"] if tag.split("/")[0] != "hparam"}
        assert {"train/loss", f"mine/{number}"} <= tags
        assert f"mine/{1 - number}" not in tags


@needs("wandb")
def test_wandb_logs_two_fits(two_runs, offline_wandb):
    fit_twice(WandbLogger(), two_runs)
    names = []
    for number, folder in enumerate(two_runs):
        (logged,), (record,) = wandb_log(folder)
        assert logged[0] == {"step": 1, "train/loss": 0.5, f"mine/{number}": 1.0}
        names.append(record.run_id)
    assert len(set(names)) == 2


@needs("mlflow")
def test_mlflow_logs_two_fits(two_runs, local_mlflow):
    fit_twice(MLFlowLogger(), two_runs)
    for number, folder in enumerate(two_runs):
        _, found = mlflow_run(folder)
        assert found.info.status == "FINISHED"
        assert set(found.data.metrics) == {"train/loss", "val/loss", f"mine/{number}"}


def test_base_of_loggers_accepts_every_call(run):
    logger = Logger()
    logger.setup(run, 0)
    logger.log_hyperparams({"optim.lr": 0.1})
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.log_figures({"train/images": figure()}, 1)
    logger.finalize("success")
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf'{name} is not installed.*pip install "cxr-vit\[logg'):
        BUILT_IN[name]()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_folder_of_the_same_name_is_no_package(name, monkeypatch, tmp_path):
    (tmp_path / name).mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    with pytest.raises(ConfigError, match="not installed"):
        BUILT_IN[name]()


# changed_settings


def test_changed_settings_differ_from_the_defaults():
    changed = Config().changed(optim={"lr": 0.1}, train={"epochs": None, "steps": 100})
    assert changed_settings(changed.flat()) == {
        "optim.lr": 0.1,
        "train.epochs": "None",
        "train.steps": 100,
    }


def test_setting_of_a_user_is_kept():
    assert changed_settings({"my.key": [1, 2]}) == {"my.key": "[1, 2]"}


def test_places_on_the_machine_are_no_hyperparameters():
    paths = {
        f"{section}.{name}"
        for section, fields in SECTIONS.items()
        for name, field in fields.model_fields.items()
        if _expand.__name__ in repr((field.annotation, field.metadata))  # PathText's validator
    }
    assert {"data.root", "run.dir", "engine.executable_cache"} <= paths
    assert changed_settings(dict.fromkeys(paths - {"model.name"}, "/elsewhere")) == {}
    assert changed_settings({"run.name": "other"}) == {}


# JsonlLogger


def events(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_event_has_its_step_and_flat_keys(run):
    logger = JsonlLogger()
    logger.setup(run, 0)
    logger.log_metrics({"train/loss": 0.25, "val/auroc/Hernia": None}, 3)
    logger.log_metrics({"val/loss": 0.5}, 3)
    assert events(run) == [
        {"step": 3, "train/loss": 0.25, "val/auroc/Hernia": None},
        {"step": 3, "val/loss": 0.5},
    ]


def test_non_finite_number_is_null_in_json(run):
    logger = JsonlLogger()
    logger.setup(run, 0)
    logger.log_metrics({"train/grad_norm": float("nan")}, 1)
    assert events(run) == [{"step": 1, "train/grad_norm": None}]


def test_resumed_log_drops_the_events_after_the_checkpoint(run):
    logger = JsonlLogger()
    logger.setup(run, 0)
    for step in (2, 4, 6):
        logger.log_metrics({"train/loss": 1.0}, step)
    with logger.path.open("a") as file:
        file.write('{"step": 4, "train/lo')  # the process was killed here
    JsonlLogger().setup(run, 4)
    assert [event["step"] for event in events(run)] == [2, 4]


# CsvLogger


def test_csv_has_a_row_per_event_and_grows_a_column_per_tag(run):
    logger = CsvLogger()
    logger.setup(run, 0)
    logger.log_metrics({"train/loss": 0.5}, 2)
    logger.log_metrics({"val/loss": 0.25, "val/auroc/Hernia": None}, 2)
    logger.log_metrics({"train/loss": 0.1}, 4)
    table = pd.read_csv(run / "metrics.csv")
    assert list(table.columns) == ["step", "train/loss", "val/loss", "val/auroc/Hernia"]
    assert list(table["step"]) == [2, 2, 4]
    assert list(table["train/loss"].dropna()) == [0.5, 0.1]
    assert table["val/loss"].dropna().to_dict() == {1: 0.25}
    assert table["val/auroc/Hernia"].isna().all()


def test_csv_keeps_all_digits(run):
    logger = CsvLogger()
    logger.setup(run, 0)
    logger.log_metrics({"train/lr": 1 / 3, "train/loss": float("inf")}, 1)
    with (run / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (float(row["train/lr"]), row["train/loss"]) == (1 / 3, "")


def test_resumed_csv_drops_later_rows_and_keeps_its_columns(run):
    logger = CsvLogger()
    logger.setup(run, 0)
    for step in (2, 4, 6):
        logger.log_metrics({"train/loss": float(step), "train/lr": 0.1}, step)
    with logger.path.open("a") as file:
        file.write("4,0.")  # the process was killed here
    resumed = CsvLogger()
    resumed.setup(run, 4)
    resumed.log_metrics({"train/loss": 60.0}, 6)
    table = pd.read_csv(run / "metrics.csv")
    assert table["step"].tolist() == [2, 4, 6]
    assert table["train/loss"].tolist() == [2.0, 4.0, 60.0]
    assert list(table.columns) == ["step", "train/loss", "train/lr"]


def test_csv_killed_before_its_first_row_starts_over(run):
    (run / "metrics.csv").write_text("step,train/lo")
    logger = CsvLogger()
    logger.setup(run, 0)
    logger.log_metrics({"train/loss": 0.5}, 2)
    assert pd.read_csv(run / "metrics.csv").to_dict("list") == {"step": [2], "train/loss": [0.5]}


# TensorBoardLogger


def read_back(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_event_files_are_in_the_runs_folder(run):
    logger = TensorBoardLogger()
    logger.setup(run, 0)
    logger.log_metrics({"train/loss": 0.5, "val/auroc/Hernia": None}, 2)
    # Before the end: the curves are live.
    assert [(e.step, e.value) for e in read_back(run).Scalars("train/loss")] == [(2, 0.5)]
    logger.log_metrics({"train/loss": 0.25}, 4)
    logger.finalize("success")
    board = read_back(run)
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(2, 0.5), (4, 0.25)]
    assert board.Tags()["scalars"] == ["train/loss"]
    assert not [path for path in run.iterdir() if path.is_dir()], "one name in TensorBoard"


def test_run_of_an_earlier_version_continues_in_its_folder(run):
    (run / "tensorboard").mkdir()
    logger = TensorBoardLogger()
    logger.setup(run, 4)
    logger.finalize("success")
    assert not list(run.glob("events.*"))
    assert len(list((run / "tensorboard").glob("events.*"))) == 1


def test_constants_are_no_curves(run):
    logger = TensorBoardLogger()
    logger.setup(run, 0)
    logger.log_metrics({"perf/compile_s": 12.34}, 0)
    logger.log_metrics({"val/auroc_defined": 14, "val/num_findings": 14, "val/loss": 1.0}, 2)
    logger.finalize("success")
    board = read_back(run)
    assert board.Tags()["scalars"] == ["val/loss"]
    (text,) = board.Tensors("compilation/text_summary")
    assert text.tensor_proto.string_val[0] == b"12.3 s"


def test_layout_begins_with_the_macro_auroc_alone(run):
    logger = TensorBoardLogger()
    logger.setup(run, 0)
    logger.finalize("success")
    (event,) = read_back(run).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    tags = [list(chart.multiline.tag) for chart in charts]
    (band,) = charts[1].margin.series
    assert (band.value, band.lower, band.upper) == (
        *("val/auroc_macro", "val/auroc_macro_low", "val/auroc_macro_high"),
    )
    assert tags == [
        ["^val/auroc_macro$"],
        [],
        ["^val/auroc/"],
        ["^train/loss$", "^val/loss$"],
        ["^train/lr$"],
        ["^perf/samples_per_s$"],
        ["^perf/data_wait_pct$"],
    ]


def test_figures_and_config_are_pages(run):
    logger = TensorBoardLogger()
    logger.setup(run, 0)
    logger.log_figures({"train/images": figure(), "plan/timeline": figure()}, 0)
    logger.log_figures({"val/roc": figure()}, 4)
    logger.finalize("success")
    board = read_back(run)
    assert board.Tags()["images"] == ["train/images", "plan/timeline", "val/roc"]
    assert [event.step for event in board.Images("val/roc")] == [4]
    (text,) = board.Tensors("config/text_summary")
    assert b"lr: 0.1" in text.tensor_proto.string_val[0]


def test_hparams_are_what_differs_from_the_defaults(run):
    logger = TensorBoardLogger()
    logger.setup(run, 0)
    logger.log_hyperparams(Config().changed(optim={"lr": 0.1}, model={"name": "vit-micro"}).flat())
    logger.log_metrics({"val/auroc_macro": 0.5, "val/auroc/Hernia": 0.25}, 2)
    logger.finalize("success")
    board = read_back(run)
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = parse_session_start_info_plugin_data(content)
    assert sorted(start.hparams) == ["model.name", "optim.lr"]
    assert start.hparams["optim.lr"].number_value == 0.1
    content = board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = parse_experiment_plugin_data(content)
    assert sorted(info.name.tag for info in experiment.metric_infos) == [
        "val/auroc_macro",
        "val/average_precision_macro",
        "val/loss",
    ]


def test_resumed_board_has_one_line(run):
    logger = TensorBoardLogger()
    logger.setup(run, 0)
    for step in (2, 4, 6):
        logger.log_metrics({"train/loss": float(step)}, step)
    logger.finalize("failed")
    resumed = TensorBoardLogger()
    resumed.setup(run, 4)
    resumed.log_metrics({"train/loss": 60.0}, 6)
    resumed.finalize("success")
    assert losses(run) == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert len(read_back(run).Tensors("config/text_summary")) == 1


def test_board_of_a_clock_set_back_has_all_steps(run, monkeypatch):
    now = time.time()
    for first_step, seconds in ((0, 0), (4, -3600), (8, -7200)):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds)
        logger = TensorBoardLogger()
        logger.setup(run, first_step)
        for step in range(first_step + 1, first_step + 7):  # two are repeated
            logger.log_metrics({"train/loss": float(step + first_step)}, step)
        logger.finalize("stopped")
    assert losses(run) == [
        *((step, step) for step in range(1, 5)),
        *((step, step + 4) for step in range(5, 9)),
        *((step, step + 8) for step in range(9, 15)),
    ]
    assert len(list(run.glob("events.*"))) == 3


def test_board_needs_no_thread(run):
    before = threading.active_count()
    logger = TensorBoardLogger()
    logger.setup(run, 0)
    logger.log_metrics({"train/loss": 0.5}, 2)
    assert threading.active_count() == before
    logger.finalize("success")


def test_file_that_is_no_event_file_is_ignored(run):
    (run / "events.out.tfevents.99x.host").write_text("")
    TensorBoardLogger().setup(run, 0)
    assert any(abs(int(path.name.split(".")[3]) - time.time()) < 60 for path in event_files(run))


# A full disk

FILE_LOGGERS = [JsonlLogger, CsvLogger, TensorBoardLogger]


def event_files(run):
    return [path for path in run.glob("events.*") if path.name.split(".")[3].isdigit()]


def losses(run):
    return [(event.step, event.value) for event in read_back(run).Scalars("train/loss")]


def logged_losses(logger, run):
    if isinstance(logger, TensorBoardLogger):
        return losses(run)
    if isinstance(logger, CsvLogger):
        with (run / "metrics.csv").open() as file:
            return [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file)]
    return [(event["step"], event["train/loss"]) for event in events(run)]


@contextlib.contextmanager
def largest_file(size):
    """Let files have at most `size` bytes in this process: writing more raises OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def log_losses(logger, steps):
    for step in steps:
        logger.log_metrics({"train/loss": float(step)}, step)


@pytest.mark.parametrize("kind", FILE_LOGGERS)
def test_events_of_a_full_disk_are_written_when_there_is_room(run, caplog, kind):
    logger = kind()
    with caplog.at_level(logging.WARNING, "cxr_vit"):
        logger.setup(run, 0)
        log_losses(logger, [1, 2])
        (path,) = [path for path in run.iterdir() if path.name != "config.yaml"]
        with largest_file(path.stat().st_size + 3):  # 3 bytes of the next record fit
            log_losses(logger, [3])
            assert logged_losses(logger, run) == [(1, 1.0), (2, 2.0)], "whole records only"
            log_losses(logger, [4, 5])
            logger.log_figures({"val/roc": figure()}, 5)
        log_losses(logger, [6])
        logger.finalize("success")
    assert logged_losses(logger, run) == [(step, float(step)) for step in range(1, 7)]
    assert caplog.text.count("cannot be written (File too large)") == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", FILE_LOGGERS)
def test_disk_that_is_full_to_the_end_is_a_warning(run, caplog, capfd, kind):
    logger = kind()
    with caplog.at_level(logging.WARNING, "cxr_vit"), largest_file(0):
        logger.setup(run, 0)
        log_losses(logger, [1, 2])
        logger.finalize("success")
    assert caplog.text.count("cannot be written (File too large)") == 1
    assert "events could not be written" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs: needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", FILE_LOGGERS)
def test_full_file_system_loses_no_event(small_disk, caplog, kind):
    logger = kind()
    logger.setup(small_disk, 0)
    log_losses(logger, [1])
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    log_losses(logger, range(2, 1000))
    assert "No space left on device" in caplog.text
    (small_disk / "filler").unlink()
    log_losses(logger, [1000])
    logger.finalize("success")
    kept = logged_losses(logger, small_disk)
    assert kept[0] == (1, 1.0)
    assert kept[-1] == (1000, 1000.0)
    assert len(kept) == 1000
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", [JsonlLogger, CsvLogger])
def test_resuming_on_a_full_disk_keeps_the_old_log(run, caplog, kind):
    logger = kind()
    logger.setup(run, 0)
    log_losses(logger, [1, 2, 3])
    before = logger.path.read_bytes()
    resumed = kind()
    with caplog.at_level(logging.WARNING, "cxr_vit"):
        with largest_file(5):
            resumed.setup(run, 2)
            log_losses(resumed, [3])
            assert logger.path.read_bytes() == before
        log_losses(resumed, [4])
    assert logged_losses(resumed, run) == [(step, float(step)) for step in range(1, 5)]
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", logger.path.name]
    assert len(caplog.records) == 1


def test_column_added_on_a_full_disk_is_written_later(run):
    logger = CsvLogger()
    logger.setup(run, 0)
    log_losses(logger, [1])
    with largest_file(5):
        logger.log_metrics({"val/loss": 2.0}, 2)
        logger.log_metrics({"val/auroc_macro": 3.0}, 3)
    log_losses(logger, [4])
    table = pd.read_csv(run / "metrics.csv")
    assert list(table.columns) == ["step", "train/loss", "val/loss", "val/auroc_macro"]
    assert table["step"].tolist() == [1, 2, 3, 4]
    assert table.iloc[0].dropna().to_dict() == {"step": 1, "train/loss": 1}
    assert table.iloc[3].dropna().to_dict() == {"step": 4, "train/loss": 4}


def test_waiting_events_take_limited_memory(run, caplog, monkeypatch):
    monkeypatch.setattr(log_files, "_MOST_WAITING", 100)
    logger = JsonlLogger()
    logger.setup(run, 0)
    with largest_file(5):
        log_losses(logger, range(1, 20))
    logger.log_metrics({"train/loss": 20.0}, 20)
    kept = [step for step, _ in logged_losses(logger, run)]
    assert kept == [1, 2, 3], "the oldest"
    assert [record.getMessage().split(" ", 1)[1] for record in caplog.records] == [
        "cannot be written (File too large). Training goes on; the events are kept meanwhile.",
        "over 0 MiB wait for room on the disk; what follows is not kept",
        "is written again; 17 events are missing.",
    ]
    log_losses(logger, [21])
    assert logged_losses(logger, run)[-1] == (21, 21.0)


@pytest.mark.parametrize("kind", [JsonlLogger, CsvLogger])
def test_pipe_of_the_name_does_not_block(run, caplog, kind):
    logger = kind()
    os.mkfifo(str(run / logger.path))
    logger.setup(run, 2)
    log_losses(logger, [3])
    logger.finalize("success")
    assert f"{logger.path} cannot be written (a named pipe, not a regular file)" in caplog.text


@pytest.mark.parametrize("kind", [JsonlLogger, CsvLogger])
@pytest.mark.parametrize("content", ["step,train/loss\n1,1.0\n9,9.0\n", '{"step": 9}\n', "x", None])
def test_link_of_the_name_is_not_followed(run, tmp_path, caplog, kind, content):
    precious, logger = tmp_path / "precious", kind()
    if content is not None:
        precious.write_text(content)
    (run / logger.path).symlink_to(precious)
    with caplog.at_level(logging.WARNING, "cxr_vit"):
        logger.setup(run, 2)
        log_losses(logger, [3])
        logger.log_metrics({"val/loss": 2.0}, 4)
        logger.finalize("success")
    assert (precious.read_text() if precious.exists() else None) == content
    assert logger.path.is_symlink()
    assert [record.getMessage() for record in caplog.records] == [
        f"{logger.path} cannot be written (a symbolic link, not a regular file)."
        " Training goes on; the events are kept meanwhile.",
        f"{logger.path}: the last 2 events could not be written.",
    ]


def test_event_file_that_becomes_a_link_is_not_followed(run, tmp_path, caplog):
    logger, precious = TensorBoardLogger(), tmp_path / "precious"
    logger.setup(run, 0)
    (path,) = event_files(run)
    path.rename(tmp_path / "moved")
    precious.write_text("precious")
    path.symlink_to(precious)
    log_losses(logger, [1])
    assert precious.read_text() == "precious"
    assert "cannot be written (a symbolic link" in caplog.text


def test_folder_of_events_that_is_a_link_is_not_followed(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run / "tensorboard").symlink_to(tmp_path / "elsewhere")
    logger = TensorBoardLogger()
    logger.setup(run, 0)
    log_losses(logger, [1])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert losses(run) == [(1, 1.0)]


def test_missing_table_is_begun_once_on_a_full_disk(run):
    logger = CsvLogger()
    logger.setup(run, 0)
    with largest_file(0):
        log_losses(logger, range(1, 50))
        assert sum(map(callable, logger._file._waiting)) == 1
    log_losses(logger, [50])
    assert logged_losses(logger, run) == [(step, float(step)) for step in range(1, 51)]
    logger.path.unlink()
    log_losses(logger, [51])
    assert logged_losses(logger, run) == [(51, 51.0)]


# Damaged logs

DAMAGED_EVENTS = {
    "no UTF-8": b'{"step": 1, "a\xff": 1}\n',
    "garbled": b"\x00\x01{]\n",
    "nested": b"[" * 100_000 + b"\n",
    "long": b"x" * 3_000_000 + b"\n",
    "empty": b"\n",
    "no object": b"5\n",
    "a list": b"[1]\n",
    "no step": b'{"train/loss": 1}\n',
    "step of the wrong type": b'{"step": [1]}\n',
    "step that is text": b'{"step": "1"}\n',
    "step that is a boolean": b'{"step": true}\n',
    "huge number": b'{"step": 1' + b"0" * 10_000 + b', "x": 1e999}\n',
    "UTF-16": '{"step": 1}'.encode("utf-16") + b"\n",
}


@pytest.mark.parametrize("line", DAMAGED_EVENTS.values(), ids=DAMAGED_EVENTS)
def test_damaged_event_does_not_stop_a_resume(run, caplog, line):
    first, last = b'{"step": 1, "train/loss": 1.0}\n', b'{"step": 2, "train/loss": 2.0}\n'
    (run / "metrics.jsonl").write_bytes(first + line + last + b'{"step": 3}\n' + b'{"step": 2, "a')
    with caplog.at_level(logging.WARNING, "cxr_vit"):
        logger = JsonlLogger()
        logger.setup(run, 2)
        log_losses(logger, [3])
    assert logged_losses(logger, run) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(caplog.records) <= 1
    if line != DAMAGED_EVENTS["huge number"]:  # to older versions of Python a later step
        assert re.search(r"metrics\.jsonl: dropped \d lines that cannot be read", caplog.text)


DAMAGED_ROWS = {
    "no UTF-8": b"1,\xff\n",
    "garbled": b"\x00\x01{]\n",
    "quote": b'1,"5\n',
    "long": b"1," * 1_000_000 + b"\n",
    "too short": b"1\n",
    "too long": b"1,2,3\n",
    "no step": b",2.0\n",
    "header": b"step,train/loss\n",
    "huge number": b"1" + b"0" * 10_000 + b",x\n",
}


@pytest.mark.parametrize("line", DAMAGED_ROWS.values(), ids=DAMAGED_ROWS)
def test_damaged_row_does_not_stop_a_resume(run, caplog, line):
    header, rows = b"step,train/loss\n1,1.0\n", b"2,2.0\n3,3.0\n2,"
    (run / "metrics.csv").write_bytes(header + line + rows)
    with caplog.at_level(logging.WARNING, "cxr_vit"):
        logger = CsvLogger()
        logger.setup(run, 2)
        log_losses(logger, [3])
    assert logged_losses(logger, run) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] in (
        ["dropped 1 lines that cannot be read."],
        ["dropped 2 lines that cannot be read."],
    )


@pytest.mark.parametrize("header", [b"", b"epoch,loss\n", b"\xff\n", b'"step\n', b"\x00,step\n"])
def test_table_without_a_header_starts_over(run, header):
    (run / "metrics.csv").write_bytes(header + b"1,1.0\n")
    logger = CsvLogger()
    logger.setup(run, 2)
    log_losses(logger, [3])
    assert logged_losses(logger, run)[-1] == (3, 3.0)


def test_column_of_a_tag_that_looks_like_a_formula_is_safe(run):
    tags = ["=1+1", "@x", "'-a", "it's", 'a "b", c', "two\nlines"]
    for first_step in (0, 1):
        logger = CsvLogger()
        logger.setup(run, first_step)
        logger.log_metrics(dict.fromkeys(tags, -1.0), first_step + 1)
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    assert header == '''step,"'=1+1","'@x","''-a","it's","a ""b"", c","two lines"'''
    assert rows == ["1,-1.0,-1.0,-1.0,-1.0,-1.0,-1.0", "2,-1.0,-1.0,-1.0,-1.0,-1.0,-1.0"]


# The files with the ids of services


@pytest.mark.parametrize("content", [b"\xff", b"", b"../x", b"a b", b"x" * 1000])
def test_damaged_id_of_a_run_begins_another_one(run, caplog, content):
    (run / "id.txt").write_bytes(content)
    assert loggers._id_in(run / "id.txt") is None
    assert "holds no id of a run" in caplog.text


def test_id_of_a_run_is_kept(run, caplog):
    loggers._keep_id(run / "id.txt", "a1-b_2.c")
    assert loggers._id_in(run / "id.txt") == "a1-b_2.c"
    with largest_file(1):
        loggers._keep_id(run / "id.txt", "other")
    assert loggers._id_in(run / "id.txt") == "a1-b_2.c"
    assert "File too large" in caplog.text


# WandbLogger


@pytest.fixture
def offline_wandb(monkeypatch, tmp_path):
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def wandb_records(file):
    """Yield the records of a W&B log, which has LevelDB's format: blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a header: the end of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_log(run):
    """Return the events and the first run record of each start."""
    logs, runs = [], []
    for folder in sorted(
        (run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime
    ):
        (file,) = folder.glob("*.wandb")
        # W&B's own process may still be writing.
        wait_for(lambda file=file: any(record.HasField("exit") for record in wandb_records(file)))
        events = []
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            if record.WhichOneof("record_type") == "history":
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                events.append({key: value for key, value in items.items() if key[0] != "_"})
        logs.append(events)
    return logs, runs


@needs("wandb")
def test_wandb_has_events_config_and_images(run, offline_wandb):
    logger = WandbLogger()
    logger.setup(run, 0)
    logger.log_hyperparams({"optim.lr": 0.1, "optim.name": "adamw"})
    logger.log_metrics({"train/loss": 0.5, "val/auroc/Hernia": None}, 2)
    logger.log_metrics({"val/auroc/Mass": 0.25}, 2)
    logger.log_metrics({"val/auroc/Hernia": None}, 3)
    logger.log_figures({"val/roc": figure()}, 2)
    logger.finalize("success")
    (events,), runs = wandb_log(run)
    assert events[:2] == [{"step": 2, "train/loss": 0.5}, {"step": 2, "val/auroc/Mass": 0.25}]
    assert [event["step"] for event in events] == [2, 2, 2]
    assert any(key.startswith("val/roc") for key in events[2])
    assert len(list((run / "wandb").glob("offline-*/files/media/images/val/roc*.png"))) == 1
    assert (runs[0].project, runs[0].display_name) == ("cxr-vit", run.name)
    assert runs[0].run_id == (run / "wandb_run_id.txt").read_text().strip()


@needs("wandb")
def test_resumed_run_continues_its_wandb_run(run, offline_wandb):
    for first_step in (0, 4):
        logger = WandbLogger(project="mine")
        logger.setup(run, first_step)
        logger.log_hyperparams({"optim.lr": 0.1 * (1 + first_step)})
        logger.log_metrics({"train/loss": 0.5}, first_step + 2)
        logger.finalize("stopped")
    logs, runs = wandb_log(run)
    assert logs == [[{"step": 2, "train/loss": 0.5}], [{"step": 6, "train/loss": 0.5}]]
    assert {record.run_id for record in runs} == {(run / "wandb_run_id.txt").read_text().strip()}
    assert {record.project for record in runs} == {"mine"}


@needs("wandb")
@pytest.mark.parametrize(("first_step", "fails"), [(0, True), (4, False)])
def test_unreachable_wandb_ends_new_runs_only(
    run, offline_wandb, monkeypatch, caplog, first_step, fails
):
    import wandb

    def init(**options):
        raise wandb.errors.CommError("no answer\nTry another timeout.")

    monkeypatch.setattr(wandb, "init", init)
    logger = WandbLogger()
    if fails:
        with pytest.raises(ConfigError, match=r"no answer\. Either run `wandb login`"):
            logger.setup(run, first_step)
    else:
        with caplog.at_level(logging.WARNING, "cxr_vit"):
            logger.setup(run, first_step)
        assert "no answer" in caplog.text
    logger.log_hyperparams({"optim.lr": 0.1})
    logger.log_metrics({"train/loss": 0.5}, 6)
    logger.log_figures({"val/roc": figure()}, 6)
    logger.finalize("success")


# MLFlowLogger


@pytest.fixture
def local_mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def mlflow_run(run, uri=None):
    from mlflow import MlflowClient

    client = MlflowClient(uri or (run / "mlruns").as_uri())
    return client, client.get_run((run / "mlflow_run_id.txt").read_text().strip())


@needs("mlflow")
def test_mlflow_has_metrics_params_and_artifacts(run, local_mlflow):
    logger = MLFlowLogger()
    logger.setup(run, 0)
    logger.log_hyperparams(Config().changed(optim={"lr": 0.1}).flat())
    logger.log_metrics({"train/loss": 0.5, "val/auroc/Hernia": None}, 2)
    logger.log_metrics({"train/loss": 0.25}, 4)
    logger.log_figures({"val/roc": figure()}, 4)
    logger.finalize("success")
    client, found = mlflow_run(run)
    assert found.info.run_name == run.name
    assert client.get_experiment(found.info.experiment_id).name == "cxr-vit"
    assert found.info.status == "FINISHED"
    assert found.data.params == {"optim.lr": "0.1"}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(2, 0.5), (4, 0.25)]
    assert list(found.data.metrics) == ["train/loss"]
    assert [item.path for item in client.list_artifacts(found.info.run_id)] == [
        "config.yaml",
        "val",
    ]
    images = client.list_artifacts(found.info.run_id, "val/roc")
    assert [item.path for item in images] == ["val/roc/step_000004.png"]


@needs("mlflow")
def test_resumed_run_continues_its_mlflow_run(run, local_mlflow, monkeypatch, tmp_path):
    uri = (tmp_path / "server").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for first_step, lr in ((0, 0.1), (4, 0.2)):
        logger = MLFlowLogger(experiment="mine")
        logger.setup(run, first_step)
        logger.log_hyperparams(Config().changed(optim={"lr": lr}).flat())
        logger.log_metrics({"train/loss": lr}, first_step + 2)
        logger.finalize("stopped")
    client, found = mlflow_run(run, uri)
    assert client.get_experiment(found.info.experiment_id).name == "mine"
    assert [m.step for m in client.get_metric_history(found.info.run_id, "train/loss")] == [2, 6]
    assert found.data.params == {"optim.lr": "0.1"}
    assert found.data.tags["resumed with optim.lr"] == "0.2"
    assert found.info.status == "KILLED"
    assert not (run / "mlruns").exists()


@needs("mlflow")
@pytest.mark.parametrize(("first_step", "fails"), [(0, True), (4, False)])
def test_unreachable_mlflow_ends_new_runs_only(
    run, local_mlflow, monkeypatch, caplog, first_step, fails
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    logger = MLFlowLogger(tracking_uri="http://127.0.0.1:9")
    if fails:
        with pytest.raises(ConfigError, match=r"MLflow cannot be used.*correct the tracking URI"):
            logger.setup(run, first_step)
    else:
        with caplog.at_level(logging.WARNING, "cxr_vit"):
            logger.setup(run, first_step)
        assert "logs nothing there" in caplog.text
    logger.log_hyperparams({"optim.lr": 0.1})
    logger.log_metrics({"train/loss": 0.5}, 6)
    logger.log_figures({"val/roc": figure()}, 6)
    logger.finalize("success")


class Outage:
    """Lets a method of MLflow's client fail while `is_down`."""

    def __init__(self, monkeypatch, method):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.is_down = True
        self.calls = 0
        answer = getattr(MlflowClient, method)

        def call(client, *args, **kwargs):
            self.calls += 1
            if self.is_down:
                raise MlflowException("API request failed: no route to host")
            return answer(client, *args, **kwargs)

        monkeypatch.setattr(MlflowClient, method, call)


@needs("mlflow")
def test_numbers_of_an_outage_are_sent_when_the_network_is_back(
    run, local_mlflow, monkeypatch, caplog
):
    logger = MLFlowLogger()
    logger.setup(run, 0)
    outage = Outage(monkeypatch, "log_batch")
    with caplog.at_level(logging.WARNING, "cxr_vit"):
        for step in (2, 4):
            logger.log_metrics({"train/loss": float(step)}, step)
            wait_for(lambda: logger._backlog._sending.done())
        assert outage.calls == 2, "the first event was tried again, the second one waits"
        outage.is_down = False
        logger.log_metrics({"train/loss": 6.0}, 6)
        logger.finalize("success")
    client, found = mlflow_run(run)
    steps = [m.step for m in client.get_metric_history(found.info.run_id, "train/loss")]
    assert steps == [2, 4, 6]
    assert caplog.text.count("no route to host") == 1
    assert "to the end of the run" not in caplog.text


@needs("mlflow")
def test_outage_to_the_end_is_a_warning(run, local_mlflow, monkeypatch, caplog):
    logger = MLFlowLogger()
    logger.setup(run, 0)
    Outage(monkeypatch, "log_batch")
    with caplog.at_level(logging.WARNING, "cxr_vit"):
        logger.log_metrics({"train/loss": 0.5}, 2)
        logger.finalize("success")
    assert "2 calls failed to the end of the run" in caplog.text  # the numbers, and the status


@needs("mlflow")
def test_refused_metric_does_not_hold_up_the_others(run, local_mlflow, caplog):
    logger = MLFlowLogger()
    logger.setup(run, 0)
    with caplog.at_level(logging.WARNING, "cxr_vit"):
        logger.log_metrics({"my metric #1!": 1.0}, 2)
        logger.log_metrics({"train/loss": 0.5}, 2)
        logger.finalize("success")
    assert mlflow_run(run)[1].data.metrics == {"train/loss": 0.5}
    assert "refused" in caplog.text
