"""train.py and evaluate.py from start to end: files, output, exit status, interruption."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import ClassVar, List, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import ViTForImageClassification

import evaluate
import train
from conftest import SMALL
from cxr_vit import cli
from cxr_vit.data.images import find_images, read_gray
from cxr_vit.data.labels import FINDINGS
from cxr_vit.training.callback import Callback
from cxr_vit.training.trainer import Trainer


class Result(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str
    log: str


@pytest.fixture
def call(monkeypatch, capsys, caplog):
    """Run a script's command line in this process, which saves the imports."""

    def call_script(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(script.main)
        return Result(ended.value.code, *capsys.readouterr(), caplog.text)

    return call_script


def command(repository, script, *arguments):
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=str(repository),
        capture_output=True,
        text=True,
    )


def events(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(event["step"], event["train/loss"]) for event in events(run) if "train/loss" in event]


def assert_same_weights(first, second):
    weights, others = (
        load_file(str(run / "checkpoints" / "last" / "model.safetensors"))
        for run in (first, second)
    )
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def trained(repository, sample_root, tmp_path_factory):
    """A run of six steps and its report, in real processes."""
    run = tmp_path_factory.mktemp("runs") / "run"
    training = command(repository, "train.py", *SMALL, f"data.root={sample_root}", f"run.dir={run}")
    assert training.returncode == 0, training.stderr
    scoring = command(repository, "evaluate.py", "--checkpoint", run / "checkpoints" / "best")
    assert scoring.returncode == 0, scoring.stderr
    return run, training, scoring


# Files of a run


def test_first_line_is_the_run_folder(trained):
    run, training, _ = trained
    assert training.stdout.splitlines()[0] == str(run)


def test_start_prints_batch_stages_and_data(trained):
    text = trained[1].stdout
    assert "global batch    8 samples per weight update = 4 micro-batch x 2 accumulation" in text
    assert "Encoder 3    --> stage 3" in text
    assert "official split (train_val_list.txt, test_list.txt, validation drawn" in text
    assert "cxr_vit_cache/films_32.u8" in text


def test_run_folder_has_the_documented_files(trained):
    run = trained[0]
    assert {path.name for path in run.iterdir() if "tfevents" not in path.name} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "report",
    }
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert len(environment["csv_sha256"]) == len(environment["split_sha256"]) == 64


def test_log_has_the_documented_tags(trained):
    tags = {tag for event in events(trained[0]) for tag in event}
    expected = {"train/loss", "train/lr", "train/grad_norm", "val/loss", "val/auroc_macro"}
    expected |= {"perf/samples_per_s", "perf/data_wait_pct", "perf/compile_s"}
    expected |= {f"val/auroc/{name}" for name in FINDINGS}
    assert expected <= tags
    assert all("step" in event for event in events(trained[0]))


def test_tensorboard_has_the_numbers_of_the_log(trained):
    board = EventAccumulator(str(trained[0]), size_guidance={"scalars": 0})
    board.Reload()
    logged = losses(trained[0])
    shown = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert [step for step, _ in shown] == [step for step, _ in logged] == [2, 4, 6]
    assert [value for _, value in shown] == pytest.approx([value for _, value in logged])
    assert set(board.Tags()["images"]) == {"train/images", "val/roc"}


def test_report_scores_every_image_of_the_split(trained, sample_root):
    run, _, scoring = trained
    names = (sample_root / "test_list.txt").read_text().split()
    with (run / "report" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image"] for row in rows) == sorted(names)
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["num_samples"] == len(names)
    assert "mean of findings" in scoring.stdout
    assert scoring.stdout.splitlines()[-1] == f"report: {run / 'report'}"


def test_checkpoint_gives_the_same_scores_in_plain_transformers(trained, sample_root):
    run = trained[0]
    model = ViTForImageClassification.from_pretrained(run / "checkpoints" / "best").eval()
    paths = find_images(sample_root)
    with (run / "report" / "predictions.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    read = [torch.from_numpy(read_gray(paths[row["image"]], 32)) for row in written]
    images = torch.stack(read).unsqueeze(1).float()
    with torch.no_grad():
        logits = model(((images / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1)).logits
    for column, name in enumerate(FINDINGS):
        expected = [float(row[f"{name}_probability"]) for row in written]
        assert torch.sigmoid(logits[:, column]).tolist() == pytest.approx(expected, abs=1e-6)


def test_config_of_the_run_repeats_the_run(trained, call, tmp_path):
    run, again = trained[0], tmp_path / "again"
    assert call(train, "--config", run / "config.yaml", f"run.dir={again}").status == 0
    assert losses(run) == losses(again)
    assert_same_weights(run, again)


# Interruption


@pytest.fixture(scope="module")
def long_run(sample_root):
    """Overrides of a run of 100 steps."""
    return (
        *SMALL,
        f"data.root={sample_root}",
        "train.steps=100",
        "train.log_every_steps=1",
        "train.checkpoint_every_steps=10",
        "train.eval_every_steps=25",
        "data.num_workers=1",
    )


@pytest.fixture(scope="module")
def uninterrupted(long_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train.main([*long_run, f"run.dir={run}"]) == 0
    return run


def start(repository, *arguments):
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, arguments)],
        cwd=str(repository),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process, run, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (run / "metrics.jsonl").exists() and any(e["step"] >= step for e in events(run)):
            return
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


@pytest.mark.parametrize(
    ("number", "status"),
    # tests/faults kills runs at many moments.
    [(signal.SIGTERM, 75), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.exhaustive)],
)
def test_killed_run_resumes_to_the_same_weights(
    repository, call, long_run, uninterrupted, tmp_path, number, status
):
    run = tmp_path / "run"
    process = start(repository, *long_run, f"run.dir={run}")
    wait_for_step(process, run, 12)
    os.killpg(process.pid, number)  # the whole group, as Ctrl-C, `timeout` and clusters do
    stdout, stderr = process.communicate()
    assert process.returncode == status, stderr
    if number == signal.SIGTERM:
        assert "SIGTERM received" in stdout
        assert "saving after this host batch" in stderr
    resumed = call(train, "--resume", run)
    assert resumed.status == 0, resumed.err
    assert resumed.out.splitlines()[0] == str(run)
    assert "from step" in resumed.out
    assert losses(run) == losses(uninterrupted)
    assert_same_weights(run, uninterrupted)


# Evaluation


def test_evaluation_of_another_split(trained, call):
    run = trained[0]
    out = run.parent / "val"
    result = call(
        evaluate, "--checkpoint", run / "checkpoints" / "last", "--split", "val", "--out", out
    )
    assert result.status == 0
    assert json.loads((out / "metrics.json").read_text())["split"] == "val"


def test_evaluation_of_a_run_scores_its_best_checkpoint(trained, call):
    run = trained[0]
    out = run.parent / "of_run"
    assert call(evaluate, "--checkpoint", run, "--out", out).status == 0
    assert (out / "metrics.json").read_text() == (run / "report" / "metrics.json").read_text()


def test_report_is_computed_again_from_its_own_files(trained, call):
    report = trained[0] / "report"
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    result = call(evaluate, "--predictions", report / "predictions.csv")
    assert result.status == 0 and "not used" not in result.out
    again = {path.name: path.read_bytes() for path in (report / "recomputed").iterdir()}
    assert set(again) == set(before) and "operating_points.json" in again
    for name in ("metrics.json", "predictions.csv", "operating_points.json"):
        assert again[name] == before[name]
    shutil.rmtree(report / "recomputed")
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before


def test_folder_with_predictions_of_the_users_own_is_refused_before_scoring(
    trained, call, tmp_path
):
    path = tmp_path / "predictions.csv"
    path.write_text("precious")
    result = call(evaluate, "--checkpoint", trained[0], "--out", tmp_path)
    assert result.status == 2
    assert f"{path} is not of a report" in result.err
    assert "images at" not in result.out, "the data are described before they are scored"
    assert path.read_text() == "precious"


def test_evaluation_never_writes_a_synthetic_data_set(trained, call, tmp_path):
    result = call(
        evaluate, "--checkpoint", trained[0] / "checkpoints" / "best",
        f"data.root={tmp_path / 'typo'}", "data.sample_images=60", "--out", tmp_path / "report",
    )  # fmt: skip
    assert result.status == 2
    assert "typo is not a folder" in result.err
    assert not (tmp_path / "typo").exists()


def test_invalid_out_folder_is_reported(trained, call, tmp_path):
    (tmp_path / "file").touch()
    result = call(
        evaluate, "--checkpoint", trained[0] / "checkpoints" / "best", "--out", tmp_path / "file"
    )
    assert result.status == 2
    assert str(tmp_path / "file") in result.err


# Data


def test_missing_data_leaves_no_run_folder(call, tmp_path):
    result = call(train, f"data.root={tmp_path / 'nowhere'}", f"run.root={tmp_path}")
    assert result.status == 2
    assert "DataError: data.root=" in result.err
    assert list(tmp_path.iterdir()) == []


def test_missing_image_is_an_error_unless_skipped(call, sample_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(str(sample_root), str(root), ignore=shutil.ignore_patterns("cxr_vit_cache"))
    for path in sorted((root / "images").iterdir())[:3]:
        path.unlink()
    arguments = (*SMALL, f"data.root={root}", f"run.dir={tmp_path / 'run'}", "train.steps=1")
    refused = call(train, *arguments)
    assert refused.status == 2
    assert "3 of 80 images are missing" in refused.err
    assert "data.on_missing=skip" in refused.err
    skipped = call(train, *arguments, "data.on_missing=skip")
    assert skipped.status == 0
    assert "3 of 80 images are missing" in skipped.log


class StopAtStart(Callback):
    """Keeps the trainer and ends the training before its first step."""

    seen: ClassVar[List[Trainer]] = []

    def on_fit_start(self, trainer, module):
        self.seen.append(trainer)
        raise KeyboardInterrupt


def test_training_images_are_augmented_and_validation_images_are_not(sample_root, tmp_path):
    words = [*SMALL, f"data.root={sample_root}", f"run.dir={tmp_path / 'run'}", "run.seed=3"]
    words.append("callbacks=[{class: test_commands.StopAtStart}]")
    with pytest.raises(KeyboardInterrupt):
        train.main([*words, "augment.rotation=5"])
    trainer = StopAtStart.seen.pop()
    assert trainer.train_data.augmentation.section.rotation == 5
    assert trainer.train_data.augmentation.seed == 3
    assert trainer.val_data.augmentation is None


def test_killed_loader_process_is_reported_in_two_lines(monkeypatch, capsys):
    from cxr_vit.engines.workers import LoaderWatch, with_user_errors

    def loader():
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")
        yield

    def main(words):
        return len(list(with_user_errors(loader(), LoaderWatch(), training=True)))

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("DataError: ") and "pid 17" in first
    assert second.startswith("DataError: ") and "data.num_workers" in second


# The demo


def test_demo_writes_its_data(repository, call, tmp_path):
    result = call(
        train, "--config", repository / "configs" / "vit_demo.yaml", "data.sample_images=60",
        f"data.root={tmp_path / 'sample'}", f"run.dir={tmp_path / 'run'}", "train.steps=2",
        "batch.gradient_accumulation=2",
    )  # fmt: skip
    assert result.status == 0
    assert "writing a synthetic data set there" in result.log
    assert len(list((tmp_path / "sample" / "images").iterdir())) == 60


def test_demo_has_one_run_folder(repository):
    result = subprocess.run(
        ["make", "-n", "demo"], cwd=str(repository), capture_output=True, text=True
    )
    assert len(set(re.findall(r"runs/vit_demo-\d{8}-\d{6}", result.stdout))) == 1
