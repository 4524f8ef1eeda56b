"""The command `compare`: which files it reads, what it prints and writes, and mistakes."""

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from cxr_vit.cli import main
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.evaluation.comparison import MEAN
from cxr_vit.evaluation.predictions import Predictions

NAMES = ("Pleural_Thickening", "Hernia", "Edema")


@pytest.fixture
def write(tmp_path):
    """Write the predictions of a run with scores of a given strength; return the run's folder."""

    def write(run, strength=1.0, *, names=NAMES, images=200, prefix=""):
        truth = (np.random.default_rng(0).random((images, len(names))) < 0.3).astype(np.int8)
        noise = np.random.default_rng(ord(run[0])).normal(size=truth.shape)
        probs = 1 / (1 + np.exp(-strength * truth - noise))
        columns = {
            "image": [f"{prefix}{row}.png" for row in range(images)],
            "patient": [str(row // 2) for row in range(images)],
            "split": "test",
        }
        relabels = np.full((images, 4), np.nan, np.float32)
        report = tmp_path / run / "report"
        report.mkdir(parents=True)
        predictions = Predictions(
            names, pd.DataFrame(columns), truth, probs.astype(np.float32), relabels
        )
        predictions.write(report / "predictions.csv")
        return tmp_path / run

    return write


def compare(*words):
    assert main(["compare", "--resamples", "120", *map(str, words)]) == 0


def test_files_reports_and_runs_are_the_same(write, capsys):
    first, second = write("a"), write("b", 2.0)
    found = []
    for inside in ("", "report", "report/predictions.csv"):
        compare(first / inside, second / inside)
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] == found[2]
    assert f"B: {second / 'report' / 'predictions.csv'}, 200 images" in found[0]


def test_files_of_a_comparison(write, tmp_path):
    out = tmp_path / "new" / "out"
    compare(write("a"), write("b", 2.0), write("c", 0.2), "--out", out, "--seed", 3)
    assert {path.name for path in out.iterdir()} == {
        *("comparison.json", "comparison.csv", "comparison.png", "comparison.svg"),
    }
    found = json.loads((out / "comparison.json").read_text())
    intervals = found["intervals"]
    assert (intervals["resamples"], intervals["seed"], intervals["patients"]) == (120, 3, 100)
    assert "not a medical device" in found["notice"]
    assert [model["name"] for model in found["models"]] == ["A", "B", "C"]
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * (1 + len(NAMES))  # models, scores, the mean and the labels
    row = next(r for r in rows if (r["model"], r["score"], r["label"]) == ("C", "auroc", "Edema"))
    entry = found["comparisons"][1]["labels"]["Edema"]
    assert int(row["positives"]) == entry["positives"]
    assert float(row["difference"]) == entry["auroc"]["difference"]["value"]
    assert float(row["p_holm"]) == entry["auroc"]["p_holm"]
    assert {r["label"] for r in rows} == {MEAN, *NAMES}
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    compare(tmp_path / "a", tmp_path / "b", "--out", out)  # again, into the same folder
    assert len(json.loads((out / "comparison.json").read_text())["models"]) == 2


def test_output_in_words_and_80_columns(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    compare(write("a", 0.2), write("b", 3.0), write("c", 0.21))
    out = capsys.readouterr().out
    assert "AUROC, mean of findings: B is better than A: +0." in out
    assert (
        "by finding, p after Holm's correction: 3 better (Pleural_Thickening, Hernia, Edema)" in out
    )
    assert "AUROC, mean of findings: the difference is no more than noise: " in out
    assert "p after Holm's correction: 3 no more than noise." in out
    assert "For research only; not a medical device." in out
    table = [line for line in out.splitlines() if line.startswith(("Pleural_Thickening ", MEAN))]
    assert len(table) == 2 * 2 * 2  # one line each, not folded
    assert max(map(len, table)) <= 80
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}  # nothing is written


def test_the_same_file_twice_does_not_differ(write, capsys, caplog):
    run = write("a")
    compare(run, run / "report")
    assert "A and B are the same file" in caplog.text
    out = capsys.readouterr().out
    assert "the difference is no more than noise: +0.0000, p 1.000" in out


def test_what_is_left_out_is_a_warning(write, tmp_path, caplog):
    first, second = write("a", images=200), write("b", images=150)
    compare(first, second, "--out", tmp_path / "out")
    text = "50 of 200 images of A are left out: not all files have them"
    assert text in caplog.text
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["warnings"] == [text]


def test_names_give_no_orders_to_the_terminal(write, capsys):
    names = ("[red]Mass[/red]", "a")
    compare(write("a", names=names), write("b", names=names))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]Mass[/red]" in out


def test_names_are_no_formulas(write, tmp_path):
    names = ("$x^$", "=1+1")
    compare(write("a", names=names), write("b", names=names), "--out", tmp_path / "out")
    assert "'=1+1" in (tmp_path / "out" / "comparison.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "1 given to compare: give the baseline first, and from 1 to 25 others"),
        (["a"] * 27, "27 given to compare"),
        (["a", "b", "--resamples", "99"], "--resamples 99 is not from 100 to 100000"),
        (["a", "b", "--resamples", "many"], "invalid int value: 'many'"),
        (["a", "b", "--seed", "-1"], "--seed -1 is negative"),
        (["a", "b", "--resampels", "100"], "Did you mean '--resamples'?"),
    ],
)
def test_mistake_on_the_command_line(words, message):
    with pytest.raises(ConfigError) as error:
        main(["compare", *words])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "no such file or folder"),
        (lambda run: shutil.rmtree(run / "report"), "neither predictions.csv nor report/predic"),
        (lambda run: put(run, b""), "the file is empty"),
        (lambda run: put(run, b"\x89PNG"), "this is a PNG image"),
        (lambda run: put(run, b"image,patient\na,b\n"), "no column 'split'"),
        (lambda run: put(run, b"image,patient,split\na,b,c\n"), "no label with a column of prob"),
        (lambda run: put(run, rows("1,1.5")), "not from 0 to 1"),
        (lambda run: put(run, rows("1,nan")), "not from 0 to 1"),
        (lambda run: put(run, rows("2,0.5")), "not 0, 1 or empty"),
        (lambda run: put(run, rows("1,0.5")), "no image of"),
        (lambda run: put(run, rows("1,0.5", name="x")), "no label is in all of the files"),
        (
            lambda run: put(run, rows("1,0.5") + b"x,1,test,1,0.4\n"),
            "an image that is there before in 1 of 2 rows",
        ),
    ],
)
def test_wrong_file_is_refused(write, tmp_path, damage, message):
    first, second = write("a"), write("b")
    damage(second)
    with pytest.raises(DataError) as error:
        compare(first, second, "--out", tmp_path / "out")
    assert message in str(error.value)
    assert str(second) in str(error.value) or "no label" in message
    assert not (tmp_path / "out" / "comparison.json").exists()


def put(run, content):
    (run / "report" / "predictions.csv").write_bytes(content)


def rows(values, name="Hernia"):
    return f"image,patient,split,{name},{name}_probability\nx,1,test,{values}\n".encode()


def test_folder_that_cannot_be_written_is_said_before_the_work(write, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="cannot be written to"):
        compare(write("a"), write("b"), "--out", tmp_path / "out")
