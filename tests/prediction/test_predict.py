"""The command `predict` as it is called: the rows, the exit status, interruptions, engines."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch
from PIL import Image
from processes.launch import finish, fork

from conftest import QUICK, ROOT, SMALL
from cxr_vit import cli
from cxr_vit.checkpoint_files import checkpoint_of
from cxr_vit.commands import evaluate, predict_run, train
from cxr_vit.data.images import read_gray
from cxr_vit.data.synthetic.dataset import write_sample
from cxr_vit.errors import CxrVitError
from cxr_vit.evaluation.operating_points import OPERATING_POINTS, OperatingPoints
from cxr_vit.evaluation.predictions import read_predictions
from cxr_vit.evaluation.scaling import scaled
from cxr_vit.files import lock
from cxr_vit.prediction import outputs
from fakes import loading

NIH = ROOT.parent / "shared" / "data" / "nih"
IPU = (
    *("engine.name=poptorch", "engine.device=auto", "engine.executable_cache=null"),
    *("pipeline.layers_per_stage=[2, 2]", "batch.gradient_accumulation=8"),
    *("batch.eval_micro_batch_size=2", "batch.eval_device_iterations=2"),
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with enough positives for thresholds."""
    root = tmp_path_factory.mktemp("data") / "sample"
    write_sample(root, num_images=400, image_size=32, seed=0)
    return root


@pytest.fixture(scope="module")
def run(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step that was evaluated: it has operating points and predictions.csv."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = [*SMALL, *QUICK, f"data.root={sample}", "train.steps=1", f"run.dir={folder}"]
    assert train.main([*words, "data.val_fraction=0.5", "schedule.warmup_steps=0"]) == 0
    short = ("evaluation.resamples=0", "report.images=false")
    assert evaluate.main(["--checkpoint", str(folder), *short]) == 0
    return folder


@pytest.fixture(scope="module")
def many(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 700 files, three chunks."""
    folder = tmp_path_factory.mktemp("many")
    images = sorted((sample / "images").iterdir())
    for number in range(700):
        os.link(images[number % len(images)], folder / f"{number:04d}.png")
    return folder


def predict(*words: Any) -> int:
    return cli.main(["predict", *map(str, words)])


def read_csv(path: Path) -> List[Dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_lines(path: Path) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(run: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuple[List[Any], str]:
    """Words of a call that takes several chunks, and the output without an interruption."""
    words = [run, many, "data.cache_workers=1"]
    out = tmp_path_factory.mktemp("whole") / "out.csv"
    assert predict(*words, "--out", out) == 0
    return words, out.read_text(encoding="utf-8")


def test_test_images_have_the_probabilities_of_predictions_csv(run, sample, tmp_path, caplog):
    expected = read_predictions(run / "report" / "predictions.csv")
    table = tmp_path / "test.csv"
    names = expected.table["image"]
    table.write_text(
        "Image Index,age\n" + "".join(f"{sample / 'images' / name},40\n" for name in names)
    )
    assert predict(run, table, "data.cache_workers=1", "--out", tmp_path / "out.csv") == 0
    rows = read_csv(tmp_path / "out.csv")
    assert [Path(row["image"]).name for row in rows] == list(names)
    for column, name in enumerate(expected.names):
        found = np.array([float(row[f"{name}_probability"]) for row in rows])
        assert np.abs(found - expected.probabilities[:, column]).max() < 1e-6

    points = OperatingPoints.read(checkpoint_of(run) / OPERATING_POINTS)
    assert points.platt and points.thresholds
    for name, scale in points.platt.items():
        given = np.array([float(row[f"{name}_probability"]) for row in rows])
        found = [float(row[f"{name}_calibrated"]) for row in rows]
        assert found == pytest.approx(list(scaled(given, *scale)), rel=1e-5)
    assert (
        f"{min(set(expected.names) - {*points.platt, *points.temperature})}_calibrated"
        not in (rows[0])
    )
    limits = points.of_kind("youden")
    for row in rows:
        above = [name for name in limits if float(row[f"{name}_probability"]) >= limits[name]]
        assert [name for name in row["findings"].split("|") if name] == above
    assert any(row["findings"] for row in rows) and "error" in rows[0]
    without = [name for name in expected.names if name not in limits]
    (said,) = [line for line in caplog.messages if line.startswith("no threshold for ")]
    assert without and said.startswith(f"no threshold for {', '.join(without)}: never a finding")


def test_bad_files_are_rows_with_their_reasons(run, sample, tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    good = (sample / "images" / "00000001_000.png").read_bytes()
    for name in ("a.png", "sub/b.PNG", "sub/new\nline.png", ".hidden/c.png", ".d.png"):
        (folder / name).write_bytes(good)
    (folder / "empty.jpg").touch()
    (folder / "page.png").write_text("<html>log in</html>")
    (folder / "cut.png").write_bytes(good[:200])
    (folder / "=formula.png").write_text("text")
    (folder / "notes.txt").write_text("text")
    (folder / "sub" / "circle").symlink_to(folder)
    (folder / "link.png").symlink_to("absent.png")
    os.mkfifo(folder / "pipe.png")
    seen = tmp_path / "seen"
    out = tmp_path / "out.csv"
    # The second path adds nothing: each file once.
    words = (run, folder, folder / "sub" / ".." / "a.png", "--preprocess-check", seen)
    assert predict(*words, "--out", out) == cli.EXIT_PARTIAL == 3
    first = f"{folder / '=formula.png'}: no PNG, JPEG or DICOM file by its content."
    summary = capsys.readouterr().out
    assert f"6 that could not be read; the first is {first}" in summary
    rows = read_csv(out)
    errors = {Path(row["image"].lstrip("'")).name: row["error"] for row in rows}
    assert list(errors) == [
        *("=formula.png", "a.png", "cut.png", "empty.jpg", "link.png", "page.png", "pipe.png"),
        *("b.PNG", "new\\nline.png"),
    ]
    assert {name for name, error in errors.items() if not error} == {
        *("a.png", "b.PNG", "new\\nline.png")
    }
    assert "ends too early" in errors["cut.png"] and "named pipe" in errors["pipe.png"]
    assert [row["Mass_probability"] for row in rows if row["error"]] == [""] * 6
    assert {path.name for path in seen.iterdir()} == {
        *("000001_a.png", "000007_b.png", "000008_new_line.png")
    }
    with Image.open(seen / "000001_a.png") as image:
        assert (np.asarray(image) == read_gray(folder / "a.png", 32)).all()
    capsys.readouterr()

    assert predict(run, folder) == cli.EXIT_PARTIAL  # the table
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "9 images: 3 with probabilities, 6 that could not be read"
    assert [line for line in lines if line.endswith(errors["cut.png"])]


def test_output_is_neither_overwritten_nor_continued_with_other_settings(
    run, sample, tmp_path, monkeypatch
):
    def refuse(path: Any, flags: int) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    image = sample / "images" / "00000001_000.png"
    out = tmp_path / "out.jsonl"
    assert predict(run, image, "--out", out) == 0
    (row,) = read_lines(out)
    assert row["image"] == str(image) and row["error"] is None and row["probabilities"]["Mass"] > 0
    before = out.read_bytes()
    for words, text in (
        ([], "not overwritten"),
        (["--resume", "--operating-point", "f1"], "options.operating_point was"),
        (["--resume", "evaluation.views=flip"], "model.views"),
    ):
        with pytest.raises(CxrVitError, match=text):
            predict(run, image, "--out", out, *words)
        assert out.read_bytes() == before
    assert predict(run, image, "--out", out, "--resume") == 0
    assert out.read_bytes() == before
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "no_link", refuse)  # a read-only file, which root may write
        with pytest.raises(CxrVitError, match=r"out\.jsonl cannot be written \(Read-only"):
            predict(run, image, "--out", out, "--resume")
    with lock(tmp_path / ".out.jsonl.lock"), pytest.raises(CxrVitError, match="is written by"):
        predict(run, image, "--out", out, "--resume")
    out.write_bytes(before + b"{}\n")
    with pytest.raises(CxrVitError, match="line 2 is none that"):
        predict(run, image, "--out", out, "--resume")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["absent.png"], "absent.png: no such file or folder"),
        (["data.num_workers=0"], "no image is given"),
        (["--keep-tags", "PatientID", "a.dcm"], "--keep-tags takes all words up to the next"),
        (["README.md", "--format", "csv", "--resume"], "--resume continues a file"),
        (["README.md", "--out", "a.csv", "--format", "table"], "is for the terminal"),
        (["README.md", "--out", "absent/a.csv"], "folder absent does not exist"),
        (["README.md", "--out", ""], "is a folder. Give the name of a file"),
        (["README.md", "--out", "tests"], "tests is a folder. Give the name of a file"),
        (["README.md", "--out", f"{'a' * 252}.csv"], r"csv cannot be written \(File name too long"),
        (["README.md", "--out", "/sys/a.csv"], r"/sys/a.csv cannot be written \("),
        (["tests"], "no images in tests"),
        (["tests", "--preprocess-check", "tests/seen"], "in a folder whose images are predicted"),
        (["tests", "--saliency", "tests/seen"], "in a folder whose images are predicted"),
    ],
)
def test_mistake_ends_before_anything_starts(run, words, text, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(CxrVitError, match=text):
        predict(run, *words)


def test_table_without_a_column_of_images_is_refused_with_its_columns(run, tmp_path):
    (tmp_path / "list.csv").write_text("picture,age\na.png,4\n")
    with pytest.raises(CxrVitError, match="It has the columns picture, age") as refused:
        predict(run, tmp_path / "list.csv")
    assert "Image Index" in str(refused.value)


def test_checkpoint_without_points_has_no_findings(run, sample, tmp_path, caplog, capsys):
    points = checkpoint_of(run) / OPERATING_POINTS
    kept = points.read_bytes()
    changed = kept.replace(b'"model_sha256": "', b'"model_sha256": "0', 1)
    image = sample / "images" / "00000001_000.png"
    try:
        points.write_bytes(
            changed[: changed.index(b'"0') + 65] + changed[changed.index(b'"0') + 66 :]
        )
        assert predict(run, image) == 0
        assert "was fitted with other" in caplog.text
        points.unlink()
        assert predict(run, image, "--format", "csv") == 0
        assert "evaluate.py --checkpoint" in caplog.text
        assert predict(run, image, "--out", tmp_path / "out.jsonl") == 0
        assert read_lines(tmp_path / "out.jsonl")[0]["findings"] is None
    finally:
        points.write_bytes(kept)
    table, _, header, row, _ = capsys.readouterr().out.splitlines()
    assert ": highest " in table
    assert "findings" not in header and "calibrated" not in header and row.startswith(str(image))


def test_killed_and_resumed_the_output_is_that_of_a_whole_run(whole, tmp_path):
    words, expected = whole
    out = tmp_path / "out.csv"
    command = [sys.executable, "-m", "cxr_vit", "predict", *map(str, words), "--out", str(out)]
    process = subprocess.Popen([*command, "--resume"], cwd=str(ROOT), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size > 10_000):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    there = out.read_text(encoding="utf-8")
    assert expected.startswith(there) and there != expected
    out.write_text(there[:-100], encoding="utf-8")  # as a kill within a write leaves it
    assert predict(*words, "--out", out, "--resume") == 0
    assert out.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_stops_after_the_chunk(whole, tmp_path, monkeypatch, number, status):
    words, expected = whole
    out = tmp_path / "out.csv"
    with monkeypatch.context() as patched:
        stop = {"--test": lambda predicted: os.kill(os.getpid(), number)}
        patched.setattr(predict_run, "watchers_of", lambda *given: stop)
        assert predict(*words, "--out", out) == status
    assert len(read_csv(out)) == 256
    assert predict(*words, "--out", out, "--resume") == 0
    assert out.read_text(encoding="utf-8") == expected


def test_full_disk_leaves_an_output_that_is_resumed(whole, tmp_path, monkeypatch):
    words, expected = whole
    out = tmp_path / "out.csv"
    sync: Callable[[int], None] = os.fsync
    calls: List[int] = []

    def fail_later(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail_later)
        with pytest.raises(CxrVitError, match=r"No space left on device.*--resume"):
            predict(*words, "--out", out)
    assert predict(*words, "--out", out, "--resume") == 0
    assert out.read_text(encoding="utf-8") == expected


def test_two_processes_write_what_one_writes(whole, run, many, tmp_path):
    _, expected = whole
    out = tmp_path / "out.csv"
    words = ["predict", run, many, "--out", out, "data.cache_workers=1", "batch.replicas=2"]
    done = finish(fork(2, "-m", "cxr_vit", *words))
    assert done.returncode == 0, done.stderr
    rows = read_csv(out)
    assert [row["image"] for row in rows] == [
        row["image"] for row in csv.DictReader(expected.splitlines())
    ]
    numbers = [float(row["Mass_probability"]) for row in rows]
    others = [float(row["Mass_probability"]) for row in csv.DictReader(expected.splitlines())]
    assert numbers == pytest.approx(others, abs=1e-6)


def test_ipus_predict_what_the_torch_engine_does(run, sample, tmp_path):
    images = sorted((sample / "images").iterdir())[:21]  # not a whole number of host batches
    words = [run, *images, "model.hidden_act=gelu_pytorch_tanh"]
    assert predict(*words, "--out", tmp_path / "torch.jsonl") == 0
    with torch.random.fork_rng(devices=[]), loading.stand_in():
        assert predict(*words, "--out", tmp_path / "ipu.jsonl", *IPU) == 0
    rows = [read_lines(tmp_path / f"{name}.jsonl") for name in ("ipu", "torch")]
    assert [len(each) for each in rows] == [21, 21]
    for found, expected in zip(*rows):
        assert found["image"] == expected["image"]
        assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


def test_files_of_pydicom_have_a_row_each_and_tags_only_if_they_are_asked_for(run, tmp_path):
    data = pytest.importorskip("pydicom.data")
    folder = Path(data.__file__).parent / "test_files"
    out = tmp_path / "out.csv"
    words = (run, folder, "data.cache_workers=1", "--out", out)
    asked = ("--keep-tags", "Modality", "BodyPartExamined")
    assert predict(*words, *asked) == cli.EXIT_PARTIAL
    rows = {Path(row["image"]).name: row for row in read_csv(out)}
    assert list(rows["6154"])[-2:] == ["dicom_Modality", "dicom_BodyPartExamined"]
    assert rows["6154"]["dicom_BodyPartExamined"] == "CSPINE" and not rows["6154"]["error"]
    assert "view LL, not frontal" in rows["6154"]["warnings"]
    headless = rows["ExplVR_LitEndNoMeta.dcm"]["error"]
    assert headless == "a DICOM file without its preamble (DICM at byte 128). Export it again."
    assert "several pictures" in rows["SC_rgb_rle_2frame.dcm"]["error"]
    assert rows["SC_rgb_rle_2frame.dcm"]["dicom_Modality"] == "OT"
    assert sum(not row["error"] for row in rows.values()) > 50
    assert "DICOMDIR" not in rows and "98890234" not in out.read_text()  # PatientID of many


@pytest.mark.skipif(not NIH.is_dir(), reason="the real images are not here")
def test_real_originals_and_a_dicom_file_are_read(run, tmp_path):
    pytest.importorskip("pydicom")
    out = tmp_path / "out.jsonl"
    status = predict(run, NIH / "images", NIH / "Fake_MONOHR1.dcm", "--out", out)
    rows = read_lines(out)
    assert len(rows) == 22
    assert [row["image"] for row in rows if row["error"]] == [] and status == 0


def test_exported_model_predicts_what_its_checkpoint_does(run, sample, tmp_path):
    pytest.importorskip("cxr_vit.prediction.onnx_model")
    pytest.importorskip("onnxruntime")
    images, words = sorted((sample / "images").iterdir())[:60], ("--format", "jsonl")
    assert cli.main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "to")]) == 0
    assert predict(run, *images, "--out", tmp_path / "torch.jsonl", *words) == 0
    assert predict(tmp_path / "to", *images, "--out", tmp_path / "onnx.jsonl", *words) == 0
    rows = [read_lines(tmp_path / f"{name}.jsonl") for name in ("onnx", "torch")]
    assert [len(each) for each in rows] == [60, 60]
    for found, expected in zip(*rows):
        assert found["image"] == expected["image"]
        for key in ("probabilities", "calibrated"):
            assert found[key] == pytest.approx(expected[key], abs=1e-4)
    with pytest.raises(CxrVitError, match="has no effect on"):
        predict(tmp_path / "to", images[0], "engine.device=cpu")
