"""predictions.csv: the exact round trip, files that are none, and scoring it again."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import pytest
import torch

from cxr_vit.commands.evaluate import main
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.errors import ConfigError, DataError, NonFiniteLoss
from cxr_vit.evaluation.bootstrap import Resamples
from cxr_vit.evaluation.metrics import EvalOutputs
from cxr_vit.evaluation.operating_points import OperatingPoints
from cxr_vit.evaluation.page import PageContext
from cxr_vit.evaluation.predictions import Predictions, predictions_of, read_predictions
from cxr_vit.evaluation.report import write_report
from scored_rows import make_predictions, random_predictions

#: Texts that a spreadsheet would run, that need quotes, or that look like something else.
NAMES = ["=1.png", "a,b.png", 'a "b".png', "'quoted.png", "'=1.png", "-1", "0012", "nan", "é.png"]


def full(rows: int = 40, seed: int = 0) -> Predictions:
    """Return predictions with everything that is known of images, and second labels."""
    generator = np.random.default_rng(seed)
    images = [*NAMES, *(f"{row}.png" for row in range(rows - len(NAMES)))]
    labels = generator.integers(-1, 2, (rows, 3))
    # Every exponent of float32 from 0 to 1.
    probs = generator.random((rows, 3)) * 2.0 ** -generator.integers(0, 140, (rows, 3))
    probs[:2] = [[0.0], [1.0]]
    ages = np.where(generator.random(rows) < 0.3, np.nan, generator.random(rows) * 100)
    ages[0] = 58.0
    about = {
        "sex": generator.choice(["M", "F", ""], rows),
        "age": ages,
        "view": generator.choice(["AP", "PA"], rows),
        "follow_up": np.arange(rows, dtype=np.float64),
    }
    found = make_predictions(
        labels, probs, generator.integers(0, 9, rows), ["=Mass", "Two Words", "Hernia"], **about
    )
    found.relabels[::2, 1:3] = generator.integers(0, 2, (rows // 2, 2))
    return replace(found, table=found.table.assign(image=images))


def same(one: Predictions, other: Predictions) -> None:
    assert one.names == other.names
    for name in ("labels", "probabilities", "relabels"):
        own, its = getattr(one, name), getattr(other, name)
        assert own.dtype == its.dtype
        assert np.array_equal(own, its, equal_nan=name == "relabels")
    assert list(one.table.columns) == list(other.table.columns)
    for name in one.table:
        own, its = one.table[name].tolist(), other.table[name].tolist()
        if name in ("age", "follow_up"):
            assert np.array_equal(own, its, equal_nan=True), "exactly"
        else:
            assert list(map(str, own)) == its
    assert one.patients.tolist() == other.patients.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_is_exact(tmp_path: Path, seed: int) -> None:
    predictions = full(seed=seed)
    predictions.write(tmp_path / "predictions.csv")
    read = read_predictions(tmp_path / "predictions.csv")
    same(predictions, read)
    read.write(tmp_path / "again.csv")
    bytes_of = [(tmp_path / name).read_bytes() for name in ("predictions.csv", "again.csv")]
    assert bytes_of[0] == bytes_of[1]


def test_what_is_known_of_the_images_is_written(make_config: Any, tmp_path: Path) -> None:
    dataset = ChestXrayDataModule(make_config()).dataset("test")
    labels = torch.from_numpy(dataset.records.labels).float()
    names = [f"label {column}" for column in range(labels.shape[1])]
    predictions = predictions_of(
        dataset.records, EvalOutputs("test", 1, 0.1, {}, labels, labels, 1.0, names)
    )
    predictions.write(tmp_path / "predictions.csv")
    same(predictions, read_predictions(tmp_path / "predictions.csv"))
    assert {"sex", "age", "view", "follow_up"} <= set(predictions.table)


def test_logits_that_are_not_finite_are_not_scored(make_config: Any) -> None:
    dataset = ChestXrayDataModule(make_config()).dataset("test")
    labels = torch.from_numpy(dataset.records.labels).float()
    outputs = EvalOutputs("test", 1, 0.1, {}, labels * float("nan"), labels, 1.0, ["a"])
    with pytest.raises(NonFiniteLoss, match=r"not finite for 20 of 20 images"):
        predictions_of(dataset.records, outputs)


def test_split_of_several_splits_is_all() -> None:
    predictions = random_predictions(10, 1, seed=0)
    assert predictions.split == "test"
    table = predictions.table.assign(split=["val", *["test"] * 9])
    assert replace(predictions, table=table).split == "all"


# Files that are no predictions


def cell(row: int, column: int, text: str) -> Callable[[List[str]], List[str]]:
    """Return a function that replaces a cell; row 0 is the header."""

    def change(lines: List[str]) -> List[str]:
        cells = lines[row].split(",")
        cells[column] = text
        return [*lines[:row], ",".join(cells), *lines[row + 1 :]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "the file is empty"),
        (lambda lines: lines[:1], "no rows below the header"),
        (lambda lines: ["<html>"], "this is a web page"),
        (lambda lines: [*lines[:2], "9.png,1,test,1"], "1 of 2 rows are cut off"),
        (lambda lines: [*lines, lines[1]], "an image that is there before in 1 of 6 rows"),
        (cell(0, 0, "picture"), "no column 'image'"),
        (cell(0, 1, "image"), "the column 'image' is there twice|no column 'patient'"),
        (
            lambda lines: [f"{line},{line.split(',')[4]}" for line in lines],
            "the column 'Mass_probability' is there twice",
        ),
        (
            lambda lines: [f"{line},{end}" for line, end in zip(lines, ["sex,sex", *["M,F"] * 5])],
            "the column 'sex' is there twice",
        ),
        (cell(0, 4, "Mass_logit"), r"no label with a column of probabilities, such as Hernia and"),
        (cell(2, 3, "2"), "a value of 'Mass' that is not 0, 1 or empty in 1 of 5 rows, first in"),
        (cell(2, 3, "-1"), "a value of 'Mass' that is not 0, 1 or empty"),
        (cell(3, 4, "1.01"), "a value of 'Mass_probability' that is not from 0 to 1 in 1 of 5"),
        (cell(3, 4, "-0.1"), "not from 0 to 1"),
        (cell(3, 4, "nan"), "not from 0 to 1"),
        (cell(3, 4, "inf"), "not from 0 to 1"),
        (cell(3, 4, ""), "not from 0 to 1"),
        (cell(3, 4, "1e-400000"), None),
        (cell(1, 0, ""), "no image in 1 of 5 rows"),
        (cell(1, 1, " "), "no patient in 1 of 5 rows"),
        (lambda lines: [line.replace("Mass", "a\x1b[2J") for line in lines], "may not be called"),
        (lambda lines: [line.replace("Mass", "m" * 101) for line in lines], "may not be called"),
        (lambda lines: [line.replace("Mass", "Macro") for line in lines], "the name of a mean"),
        (lambda lines: [line.replace("Mass", "sex") for line in lines], "of another column"),
        (lambda lines: ["\0" * 50], "zero bytes"),
    ],
)
def test_file_that_is_no_predictions_csv_is_refused(
    tmp_path: Path, change: Callable[[List[str]], List[str]], message: Any
) -> None:
    path = tmp_path / "predictions.csv"
    truth = np.array([[0], [1], [0], [1], [0]])
    make_predictions(truth, truth, names=["Mass"]).write(path)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    if message is None:
        read_predictions(path)
        return
    with pytest.raises(DataError, match=message) as caught:
        read_predictions(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(DataError, match=rf"{path}: cannot be read"):
            read_predictions(path)


def test_label_with_the_name_of_a_second_label_is_read_as_a_label(tmp_path: Path) -> None:
    found = full()
    found = replace(found, names=("Fracture_google2019", *found.names[1:]))
    found.relabels[:] = np.nan
    path = tmp_path / "predictions.csv"
    found.write(path)
    same(found, read_predictions(path))
    found.relabels[:, 0] = 1
    found.write(path)
    assert path.read_text().split("\n")[0].count("Fracture_google2019,") == 1


@pytest.mark.filterwarnings("error")
def test_a_thousand_labels_are_written_and_read(tmp_path: Path) -> None:
    found = random_predictions(5, 1000, seed=0)
    found = replace(found, names=tuple(f"label {number}" for number in range(1000)))
    found.write(tmp_path / "predictions.csv")
    assert read_predictions(tmp_path / "predictions.csv").names == found.names


# evaluate.py --predictions


@pytest.fixture
def report(tmp_path: Path) -> Path:
    folder = tmp_path / "report"
    _write(folder, full(), points=OperatingPoints.fit(full(seed=1)))
    return folder


def _write(folder: Path, predictions: Predictions, **given: Any) -> Any:
    context, origin = PageContext("a run", "", {}), {"step": 7, "checkpoint": "a"}
    return write_report(
        folder, predictions, context, resamples=Resamples(30), origin=origin, **given
    )


def test_scores_of_the_file_are_those_of_the_model(
    report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    given = ["--predictions", str(report / "predictions.csv")]
    assert main([*given, "evaluation.resamples=30"]) == 0
    out = report / "recomputed"
    assert {path.name for path in report.iterdir()} == {*before, "recomputed"}
    assert {path.name for path in out.iterdir()} == set(before)
    for name, content in before.items():
        assert (report / name).read_bytes() == content, "the page has images, which are not here"
    for name in ("predictions.csv", "metrics.json", "roc.png", "operating_points.json"):
        assert (out / name).read_bytes() == before[name]
    printed = capsys.readouterr().out
    assert "40 images, 3 labels" in printed and f"report: {out}" in printed
    assert "not used" not in printed


def test_split_that_evaluate_does_not_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    full().write(path)
    path.write_text(path.read_text().replace(",test,", ",<b>,"))
    with pytest.raises(DataError, match=r"a split that is none of train, val, test, all in 40"):
        read_predictions(path)


def test_report_goes_to_another_folder(report: Path, tmp_path: Path) -> None:
    given = ["--predictions", str(report / "predictions.csv"), "--out", str(tmp_path / "other")]
    assert main([*given, "evaluation.resamples=0"]) == 0
    one, other = (
        json.loads((f / "metrics.json").read_text()) for f in (report, tmp_path / "other")
    )
    assert other["intervals"]["resamples"] == 0
    assert other["findings"]["Hernia"]["brier"]["low"] is None
    assert other["auroc"] == one["auroc"]
    assert (other["step"], other["checkpoint"]) == (7, "a"), "facts of the same predictions"
    same(full(), read_predictions(tmp_path / "other" / "predictions.csv"))


def test_facts_of_other_predictions_are_not_kept(report: Path, capsys: Any) -> None:
    path = report / "predictions.csv"
    path.write_text(re.sub("\n[^\n]*\n$", "\n", path.read_text()))
    assert main(["--predictions", str(path), "evaluation.resamples=0"]) == 0
    other = json.loads((report / "recomputed" / "metrics.json").read_text())
    assert other["num_samples"] == 39
    assert "step" not in other
    assert other["operating_points"] is None and other["operating_points_sha256"] is None
    assert not (report / "recomputed" / "operating_points.json").exists()
    assert f"{report / 'operating_points.json'} is not used: no metrics.json" in _words(capsys)


def _words(capsys: Any) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_operating_points_of_another_model_are_not_used(report: Path, capsys: Any) -> None:
    OperatingPoints.fit(full(seed=2)).write(report / "operating_points.json")
    given = ["--predictions", str(report / "predictions.csv"), "evaluation.resamples=0"]
    assert main(given) == 0
    assert json.loads((report / "recomputed" / "metrics.json").read_text())["step"] == 7
    assert "operating_points.json is not used" in _words(capsys)
    assert not (report / "recomputed" / "operating_points.json").exists()


def test_operating_points_of_an_earlier_report_are_removed(report: Path, capsys: Any) -> None:
    metrics = json.loads((report / "metrics.json").read_text())
    content = (report / "operating_points.json").read_bytes()
    assert metrics["operating_points_sha256"] == hashlib.sha256(content).hexdigest()
    assert _write(report, full(seed=3))["operating_points_sha256"] is None
    assert not (report / "operating_points.json").exists()


def test_predictions_of_the_users_own_are_not_replaced(report: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    path = folder / "predictions.csv"
    path.write_text("precious")
    for attempt in (
        lambda: main(["--predictions", str(report / "predictions.csv"), "--out", str(folder)]),
        lambda: _write(folder, full()),
    ):
        with pytest.raises(DataError, match=rf"{path} is not of a report .* --out"):
            attempt()
    assert path.read_text() == "precious" and len(list(folder.iterdir())) == 1


def test_report_that_was_cut_off_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cxr_vit.evaluation.report.sha256_of", fail)
        with pytest.raises(DataError, match="No space left"):
            _write(tmp_path, full())
    assert not (tmp_path / "metrics.json").exists() and (tmp_path / "predictions.csv").exists()
    _write(tmp_path, full())
    assert (tmp_path / "metrics.json").exists()


def test_columns_of_the_users_own_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    random_predictions(30, 2, seed=0).write(path)
    lines = path.read_text().splitlines()
    own = tmp_path / "predictions.csv"
    own.write_text(
        "\n".join(f"{line},{'note' if row == 0 else 'x'}" for row, line in enumerate(lines)) + "\n"
    )
    before = own.read_bytes()
    for out in ([], ["--out", str(tmp_path)]):
        assert main(["--predictions", str(own), "evaluation.resamples=9", *out]) == 0
        assert own.read_bytes() == before
    for folder in (tmp_path, tmp_path / "recomputed"):
        assert json.loads((folder / "metrics.json").read_text())["num_samples"] == 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "a.csv", "--checkpoint", "b"], "--checkpoint has no effect with --pred"),
        (["--predictions", "a.csv", "--split", "val"], "--split has no effect with --predictions"),
        (["--predictions", "a.csv", "--data", "b.yaml"], "--data has no effect with --predictions"),
        (["--predictions", "a.csv", "data.root=b"], "data.root=b: with --predictions only evaluat"),
        (
            ["--predictions", "a.csv", "evaluation.views=flip"],
            "only evaluation.resamples has an effect",
        ),
        (["a.csv"], "a.csv: predictions are given as --predictions a.csv"),
        ([], "required: --checkpoint, or --predictions"),
        (["--predictions", "a.csv", "evaluation.resamples=-1"], "evaluation.resamples"),
    ],
)
def test_mistake_is_answered_with_what_to_write(words: List[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        main(words)
