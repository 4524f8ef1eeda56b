"""train.py and evaluate.py as a person runs them, in processes of their own."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import ViTForImageClassification

from cxr_vit.data.images import find_images, read_gray
from cxr_vit.data.labels import FINDINGS


def command(repository, script, *arguments):
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=str(repository),
        capture_output=True,
        text=True,
    )


def events(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(repository, sample_root, tmp_path_factory):
    """A run of six steps and its report."""

    run = tmp_path_factory.mktemp("runs") / "run"
    train = command(repository, "train.py", *SMALL, f"data.root={sample_root}", f"run.dir={run}")
    assert train.returncode == 0, train.stderr
    evaluate = command(repository, "evaluate.py", "--checkpoint", run / "checkpoints" / "best")
    assert evaluate.returncode == 0, evaluate.stderr
    return run, train, evaluate


def test_the_first_line_is_the_runs_folder(trained):
    run, train, _ = trained
    assert train.stdout.splitlines()[0] == str(run)


def test_the_start_prints_the_batch_and_the_stages(trained):
    text = trained[1].stdout
    assert "global batch    8 samples per weight update = 4 micro-batch x 2 accumulation" in text
    assert "Encoder 3    --> stage 3" in text
    assert "official split (train_val_list.txt, test_list.txt, validation drawn" in text
    assert "cxr_vit_cache/films_32.u8" in text


def test_the_run_folder_is_the_designs(trained):
    run = trained[0]
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "report",
    }
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert len(environment["csv_sha256"]) == len(environment["split_sha256"]) == 64


def test_the_log_has_the_designs_tags(trained):
    tags = {tag for event in events(trained[0]) for tag in event}
    expected = {"train/loss", "train/lr", "train/grad_norm", "val/loss", "val/auroc_macro"}
    expected |= {"perf/samples_per_s", "perf/data_wait_pct", "perf/compile_s"}
    expected |= {f"val/auroc/{name}" for name in FINDINGS}
    assert expected <= tags
    assert all("step" in event for event in events(trained[0]))


def test_tensorboard_shows_the_logs_numbers(trained):
    board = EventAccumulator(str(trained[0] / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    logged = [(e["step"], e["train/loss"]) for e in events(trained[0]) if "train/loss" in e]
    shown = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert [step for step, _ in shown] == [step for step, _ in logged] == [2, 4, 6]
    assert [value for _, value in shown] == pytest.approx([value for _, value in logged])
    pictures = {"train/images", "val/roc", "plan/timeline", "plan/memory"}
    assert pictures <= set(board.Tags()["images"])


def test_the_report_scores_every_image_of_the_split(trained, sample_root):
    run, _, evaluate = trained
    names = (sample_root / "test_list.txt").read_text().split()
    with (run / "report" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image"] for row in rows) == sorted(names)
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["num_samples"] == len(names)
    assert "mean of findings" in evaluate.stdout
    assert evaluate.stdout.splitlines()[-1] == f"report: {run / 'report'}"


def test_the_checkpoint_loads_in_plain_transformers_with_the_same_scores(trained, sample_root):
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


def test_another_split_goes_to_a_report_of_its_own(trained, repository):
    run = trained[0]
    result = command(
        repository, "evaluate.py", "--checkpoint", run / "checkpoints" / "last", "--split", "val",
        "--out", run.parent / "val",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((run.parent / "val" / "metrics.json").read_text())["split"] == "val"


def test_the_runs_config_repeats_the_run(trained, repository, tmp_path):
    run = trained[0]
    again = tmp_path / "again"
    result = command(repository, "train.py", "--config", run / "config.yaml", f"run.dir={again}")
    assert result.returncode == 0, result.stderr
    losses = [[e["train/loss"] for e in events(path) if "train/loss" in e] for path in (run, again)]
    assert losses[0] == losses[1]
    first, second = (
        load_file(str(path / "checkpoints" / "last" / "model.safetensors")) for path in (run, again)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_killed_run_resumes_to_the_same_weights(
    repository, sample_root, tmp_path, number, status
):
    """The whole process group is signalled, as Ctrl-C, `timeout` and clusters do."""

    long = (*SMALL, f"data.root={sample_root}", "train.steps=100", "train.log_every_steps=1")
    long = (
        *long,
        "train.checkpoint_every_steps=10",
        "train.eval_every_steps=25",
        "data.num_workers=1",
    )
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = start(repository, *long, f"run.dir={run}")
    wait_for_step(process, run, 12)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate()
    assert process.returncode == status, stderr
    if number == signal.SIGTERM:
        assert "SIGTERM received" in stdout
        assert "saving after this step" in stderr
    resumed = command(repository, "train.py", "--resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[0] == str(run)
    assert "from step" in resumed.stdout
    straight = command(repository, "train.py", *long, f"run.dir={whole}")
    assert straight.returncode == 0, straight.stderr
    losses = [
        [(e["step"], e["train/loss"]) for e in events(path) if "train/loss" in e]
        for path in (run, whole)
    ]
    assert losses[0] == losses[1]
    first, second = (
        load_file(str(path / "checkpoints" / "last" / "model.safetensors")) for path in (run, whole)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scoring_never_writes_a_synthetic_data_set(trained, repository, tmp_path):
    result = command(
        repository, "evaluate.py", "--checkpoint", trained[0] / "checkpoints" / "best",
        f"data.root={tmp_path / 'typo'}", "data.sample_images=60", "--out", tmp_path / "report",
    )  # fmt: skip
    assert result.returncode == 2
    assert "typo is not a folder" in result.stderr
    assert not (tmp_path / "typo").exists()


def test_an_out_that_cannot_be_made_is_told_in_a_line(trained, repository, tmp_path):
    (tmp_path / "file").touch()
    result = command(
        repository, "evaluate.py", "--checkpoint", trained[0] / "checkpoints" / "best",
        "--out", tmp_path / "file",
    )  # fmt: skip
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert str(tmp_path / "file") in result.stderr


def test_the_demo_names_one_run_folder(repository):
    result = subprocess.run(
        ["make", "-n", "demo"], cwd=str(repository), capture_output=True, text=True
    )
    assert len(set(re.findall(r"runs/vit_demo-\d{8}-\d{6}", result.stdout))) == 1


def test_bad_data_leaves_no_run_folder_behind(repository, tmp_path):
    result = command(
        repository, "train.py", f"data.root={tmp_path / 'nowhere'}", f"run.root={tmp_path}"
    )
    assert result.returncode == 2
    assert "DataError: data.root=" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_image_is_an_error_until_told_to_skip(repository, sample_root, tmp_path):

    root = tmp_path / "data"
    shutil.copytree(str(sample_root), str(root), ignore=shutil.ignore_patterns("cxr_vit_cache"))
    for path in sorted((root / "images").iterdir())[:3]:
        path.unlink()
    arguments = (*SMALL, f"data.root={root}", f"run.dir={tmp_path / 'run'}", "train.steps=1")
    refused = command(repository, "train.py", *arguments)
    assert refused.returncode == 2
    assert "3 of 80 images are missing" in refused.stderr
    assert "data.on_missing=skip" in refused.stderr
    skipped = command(repository, "train.py", *arguments, "data.on_missing=skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "3 of 80 images are missing" in skipped.stderr


def test_training_images_are_varied_and_validation_images_are_not(
    sample_root, tmp_path, monkeypatch
):
    import train
    from cxr_vit.training.trainer import Trainer

    seen = []

    def fit(trainer):
        seen.append(trainer)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", fit)
    words = [*SMALL, f"data.root={sample_root}", f"run.dir={tmp_path / 'run'}", "run.seed=3"]
    with pytest.raises(KeyboardInterrupt):
        train.main([*words, "augment.rotation=5"])
    (trainer,) = seen
    assert trainer.train.augmentation.section.rotation == 5
    assert trainer.train.augmentation.seed == 3
    assert trainer.val.augmentation is None


def test_a_loader_process_that_is_killed_is_told_in_two_lines(monkeypatch, capsys):
    from cxr_vit import cli

    def main(words):
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "pid 17" in said and "data.num_workers" in said and "Traceback" not in said


def test_the_demo_config_makes_its_data_and_says_so(repository, tmp_path):
    result = command(
        repository, "train.py", "--config", "configs/vit_demo.yaml", "data.sample_images=60",
        f"data.root={tmp_path / 'sample'}", f"run.dir={tmp_path / 'run'}", "train.steps=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "writing a synthetic data set there" in result.stderr
    assert len(list((tmp_path / "sample" / "images").iterdir())) == 60
