"""evaluate.py --data, and Trainer.test with other data than the module's."""

from __future__ import annotations

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cxr_vit
import layouts
from conftest import SMALL
from cxr_vit import cli
from cxr_vit.commands import evaluate, members, train
from cxr_vit.data.labels import FINDINGS
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.evaluation.label_match import LabelMatch
from plain_loop import UNKNOWN, masked_loss, write_unknown

TWO = "data={format: table, csv: labels.csv, columns: {image: file, patient: who}, labels: [%s]}"


@pytest.fixture(scope="module")
def run(sample_root, tmp_path_factory):
    """A run of one step on NIH's layout."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = [*SMALL, f"data.root={sample_root}", "train.steps=1", f"run.dir={folder}"]
    assert train.main(words) == 0
    return folder


@pytest.fixture
def chexpert(tmp_path):
    return layouts.chexpert(tmp_path / "chexpert")


@pytest.fixture
def call(run, capsys, caplog):
    """Evaluate the run; return the content of metrics.json, the output and the log."""

    def evaluated(*words, folder="report"):
        out = run / folder
        assert evaluate.main(["--checkpoint", str(run), *map(str, words)]) == 0
        output = capsys.readouterr().out
        assert output.splitlines()[-1] == f"report: {out}"
        return json.loads((out / "metrics.json").read_text()), output, caplog.text

    return evaluated


def predictions(folder):
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def refused(monkeypatch, capsys, *words):
    """Return the one line that a command prints to stderr; its status is 2."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.run(evaluate.main)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Error: " in line]
    return line


def test_every_image_of_a_preset_is_scored_with_the_labels_that_both_have(run, call, chexpert):
    words = ("--data", "data/chexpert", f"data.root={chexpert}")
    metrics, output, _ = call(*words, folder="report/chexpert")
    assert (metrics["split"], metrics["num_samples"]) == ("all", 32)
    assert len(metrics["auroc"]) == 8
    assert metrics["label_map"]["Pleural Effusion"] == ["Effusion"]
    assert metrics["label_map"]["Lung Lesion"] == ["Mass", "Nodule"]
    assert "Fracture" in metrics["labels_without_counterpart"]["data"]
    assert "Hernia" in metrics["labels_without_counterpart"]["model"]
    assert "labels of the model without one in the data: Infiltration, Emphysema" in output
    about = metrics["data"]
    assert about["config"] == ["data/chexpert"] and about["overrides"] == list(words[2:])
    assert set(about["files"]) == {str(chexpert / "train.csv"), str(chexpert / "valid.csv")}
    assert about["images_of_training"] == 0 and "of the training" not in output
    assert sum(metrics["unknown"].values()) > 10, "uncertain ones"

    rows = predictions(run / "report/chexpert")
    assert list(rows[0])[:5] == [
        *("image", "patient", "split", "Cardiomegaly", "Cardiomegaly_probability")
    ]
    assert {row["split"] for row in rows} == {"all"}
    given = {}
    for name in ("train.csv", "valid.csv"):
        with (chexpert / name).open(newline="") as file:
            given.update({row["Path"]: row for row in csv.DictReader(file)})
    word = {"1.0": "1", "0.0": "0", "": "0", "-1.0": ""}
    for row in rows:
        for name in ("Edema", "Pleural Effusion"):
            assert row[name] == word[given[row["image"]][name]]
    assert not (run / "report" / "metrics.json").exists()


def test_probability_of_a_mapped_label_is_the_highest_of_the_model(run, sample_root, call):
    """The run's own images, as another data set: the model scores them as always."""
    call()
    own = {row["image"]: row for row in predictions(run / "report")}
    split = ("--split", "test", f"data.root={sample_root}")
    file = run / "nih.yaml"
    file.write_text("data:\n  label_map: {Nodule: [Mass, Nodule]}\n  include_no_finding: true\n")
    metrics, _, _ = call("--data", file, *split, folder="report/nih_test")
    rows = predictions(run / "report/nih_test")
    assert len(rows) == len(own) == 20
    for row in rows:
        expected = own[row["image"]]
        assert row["Hernia_probability"] == expected["Hernia_probability"]
        both = [float(expected[f"{name}_probability"]) for name in ("Mass", "Nodule")]
        assert float(row["Nodule_probability"]) == max(both)
    assert metrics["labels_without_counterpart"]["data"] == ["No Finding"]
    assert metrics["data"]["images_of_training"] == 0, "of the test split"


def test_file_of_the_data_keeps_its_images_out_of_the_report(run, sample_root, call, tmp_path):
    for shows in (True, False):
        data = tmp_path / "other.yaml"
        report = f"{{images: {str(shows).lower()}, saliency: none}}"
        data.write_text(f"data: {{root: '{sample_root}'}}\nreport: {report}\n")
        call("--data", data, folder="report/other")
        page = (run / "report/other/report.html").read_text(encoding="utf-8")
        assert ("data:image/png" in page) == shows and "data:image/jpeg" not in page


def test_images_of_the_training_are_counted(run, sample_root, call, caplog):
    file = run / "two_lines.yaml"
    file.write_text(f"data:\n  root: {sample_root}\n")
    metrics, _, log = call("--data", file, folder="report/two_lines")
    assert metrics["num_samples"] == 80 and metrics["split_kind"] == "all"
    assert metrics["data"]["images_of_training"] == 60
    assert "60 of 80 images have the names of images that the model was trained or val" in log
    assert "give --split test" in log


def test_scoring_validation_images_for_lack_of_test_images_is_said(run, call):
    words = ("data.split=patient", "data.val_fraction=0.3", "data.test_fraction=0")
    metrics, _, log = call(*words)
    assert metrics["split"] == "val"
    assert "no test images: scoring the validation images, which also chose the best" in log


def test_training_data_that_are_gone_are_not_compared(run, call, chexpert, sample_root, tmp_path):
    moved = tmp_path / "elsewhere"
    sample_root.rename(moved)
    try:
        words = ("--data", "data/chexpert", f"data.root={chexpert}", "--split", "test")
        metrics, output, _ = call(*words, folder="report/chexpert_test")
    finally:
        moved.rename(sample_root)
    assert (
        "not compared with the images of the training, which cannot be read: data.root=" in output
    )
    assert metrics["data"]["images_of_training"] is None
    assert metrics["num_samples"] == 8, "of valid.csv"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.image_size=64"], r"data.image_size=64 of the data is not that of the model, 32"),
        (["data.resample=bicubic"], "data.resample=bicubic of the data is not that of the model"),
        (["data.labels=[Fracture, Support Devices]", "data.label_map={}"], "no label in common"),
        (["data.label_map={Tube: Mass}"], "data.label_map: 'Tube' is none of data.labels"),
        (["data.root=nowhere"], "nowhere"),
        (["data.column=1"], "unknown key 'data.column'. Did you mean 'data.columns'?"),
        (["callbacks=[]"], "scoring has no callbacks"),
    ],
)
def test_data_that_cannot_be_compared_are_refused(
    run, monkeypatch, capsys, chexpert, words, message
):
    given = ["--checkpoint", run, "--data", "data/chexpert", f"data.root={chexpert}"]
    line = refused(monkeypatch, capsys, *given, *words)
    assert message in line
    assert not list(chexpert.glob("cxr_vit_cache/*")), "before an image is read"


def test_data_without_a_file_are_refused(run, monkeypatch, capsys):
    line = refused(monkeypatch, capsys, "--checkpoint", run, "--data", "data.root=elsewhere")
    assert "--data data.root=elsewhere: give a YAML file" in line


def test_report_of_other_data_follows_no_link(run, monkeypatch, capsys, chexpert, tmp_path):
    report, kept = run / "report", run / "kept"
    if report.exists():
        report.rename(kept)
    report.symlink_to(tmp_path)
    try:
        given = ["--checkpoint", run, "--data", "data/chexpert", f"data.root={chexpert}"]
        assert f"{report} (a symbolic link)" in refused(monkeypatch, capsys, *given)
    finally:
        report.unlink()
        if kept.exists():
            kept.rename(report)


# Trainer.test


def write_hospital(folder, sample_root, names):
    """Write a table of two labels for images of the sample, the second unknown for every other."""
    lines = ["file,who," + ",".join(names)]
    images = sorted(path.name for path in (sample_root / "images").iterdir())
    for number, image in enumerate(images[:40]):
        lines.append(f"{image},p{number // 2},{number % 2},{'' if number % 3 else number % 2}")
    folder.joinpath("labels.csv").write_text("\n".join(lines))


@pytest.fixture
def notebook(run, sample_root, tmp_path, make_config):
    """A trainer with the module of the run, and a function that makes other data."""

    def data_of(*names):
        write_hospital(tmp_path, sample_root, names)
        csv = f"data.csv={tmp_path / 'labels.csv'}"
        return cxr_vit.ChestXrayDataModule(
            make_config(TWO % ", ".join(names), csv, f"data.root={sample_root}", "data.split=all")
        )

    trainer = cxr_vit.Trainer(make_config())
    return trainer, cxr_vit.ViTModule.load_from_checkpoint(run, config=make_config()), data_of


def test_trainer_tests_other_data_by_the_names_of_their_labels(notebook):
    trainer, module, data_of = notebook
    scores = trainer.test(module, data_of("edema", "Mass"))
    outputs = trainer.test_outputs
    assert outputs.names == ["edema", "Mass"] and outputs.labels.shape == (40, 2)
    assert set(outputs.labels[:, 1].tolist()) == {0.0, 1.0, -1.0}
    probs = torch.sigmoid(outputs.logits)
    known = outputs.labels >= 0
    terms = -torch.where(outputs.labels == 1, probs, 1 - probs).log()
    assert scores["test/loss"] == pytest.approx(float(terms[known].sum() / 80), abs=1e-6)
    positive = probs[outputs.labels[:, 0] == 1, 0][:, None]
    negative = probs[outputs.labels[:, 0] == 0, 0]
    assert scores["test/auroc/edema"] == pytest.approx(float((positive > negative).float().mean()))
    assert scores["test/num_findings"] == 2


def test_training_on_data_with_other_labels_than_the_module_is_refused(notebook):
    trainer, module, data_of = notebook
    data = data_of("edema", "Mass")
    data.config = trainer.config  # the names are what differs
    with pytest.raises(ConfigError, match=r"the data module has the labels \['edema', 'Mass'\]"):
        trainer.fit(module, data)


def test_unknown_labels_are_left_out_of_the_loss_of_a_module_without_them(
    notebook, sample_root, tmp_path, make_config
):
    """Its own loss has no mask."""
    trainer, module, _ = notebook
    write_unknown(sample_root, tmp_path / "unknown.csv")
    words = (*UNKNOWN, f"data.csv={tmp_path / 'unknown.csv'}", "data.split=all")
    loss = trainer.test(module, cxr_vit.ChestXrayDataModule(make_config(*words)))["test/loss"]
    outputs = trainer.test_outputs
    assert outputs.names == list(FINDINGS) and bool((outputs.labels == -1).any())
    assert loss == pytest.approx(float(masked_loss(outputs.logits, outputs.labels)), abs=1e-6)


def test_a_modules_own_metrics_get_no_unknown_labels_if_its_data_have_none(
    notebook, sample_root, tmp_path, make_config
):
    trainer, module, _ = notebook
    seen = []
    module.compute_metrics = lambda logits, labels: seen.append(labels) or {"mine": 1.0}
    trainer.test(module, cxr_vit.ChestXrayDataModule(make_config(f"data.root={sample_root}")))
    assert trainer.test_outputs.scores == {"mine": 1.0} and len(seen) == 1
    write_unknown(sample_root, tmp_path / "unknown.csv")
    words = (*UNKNOWN, f"data.csv={tmp_path / 'unknown.csv'}", "data.split=all")
    scores = trainer.test(module, cxr_vit.ChestXrayDataModule(make_config(*words)))
    assert len(seen) == 1 and "test/auroc_macro" in scores


@pytest.fixture(scope="module")
def other_run(sample_root, tmp_path_factory):
    """A run of another architecture, size, normalisation and view, on the same data."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    words = [*SMALL, f"data.root={sample_root}", "train.steps=1", f"run.dir={folder}"]
    words += ["data.image_size=16", "data.resize=20", "model.image_mean=0.3", "run.seed=1"]
    assert train.main([*words, "pipeline.layers_per_stage=[2, 2]", "loss.name=bce"]) == 0
    return folder


def test_an_ensemble_averages_the_probabilities_of_its_members(run, other_run, capsys, tmp_path):
    words = ["--checkpoint", str(run), str(other_run), "--split", "val"]
    for folder in (run, other_run):
        assert evaluate.main(["--checkpoint", str(folder), "--split", "val"]) == 0
    capsys.readouterr()
    assert evaluate.main(words) == 0
    output = capsys.readouterr().out
    out = run / "report-ensemble_val"
    assert output.splitlines()[-1] == f"report: {out}"
    assert "an ensemble of 2 checkpoints: 2 times the time of one" in output
    alone = [folder / "report_val" for folder in (run, other_run)]
    rows, *others = (predictions(folder) for folder in (out, *alone))
    column = f"{FINDINGS[0]}_probability"
    for row, first, second in zip(rows, *others):
        mean = (float(first[column]) + float(second[column])) / 2
        assert float(row[column]) == pytest.approx(mean, abs=1e-5)
        assert row["image"] == first["image"] == second["image"]
    metrics = json.loads((out / "metrics.json").read_text())
    single = [json.loads((folder / "metrics.json").read_text()) for folder in alone]
    assert [member["auroc_macro"] for member in metrics["members"]] == [
        each["auroc_macro"] for each in single
    ]
    assert [member["checkpoint"] for member in metrics["members"]] == [
        each["checkpoint"] for each in single
    ]
    assert "members" not in single[0] and "views" not in single[0]
    assert metrics["members"][0]["csv_sha256"] == single[0]["csv_sha256"]


def test_an_ensemble_of_two_runs_scores_other_data(run, other_run, chexpert, capsys, tmp_path):
    words = [f"data.root={chexpert}", "evaluation.views=flip", "--data", "data/chexpert"]
    both = ["--checkpoint", str(run), str(other_run)]
    assert evaluate.main([*both, *words]) == 0
    output = capsys.readouterr().out
    assert output.count("evaluation.views=flip: 2 views of each image") == 2
    out = run / "report-ensemble" / "chexpert"
    assert output.splitlines()[-1] == f"report: {out}"
    metrics = json.loads((out / "metrics.json").read_text())
    assert [member["views"] for member in metrics["members"]] == ["flip", "flip"]
    assert metrics["members"][0]["label_map"]["Lung Lesion"] == ["Mass", "Nodule"]
    alone = []
    for folder in (run, other_run):
        single = tmp_path / folder.name
        assert evaluate.main(["--checkpoint", str(folder), *words, "--out", str(single)]) == 0
        alone.append(predictions(single))
    column = "Lung Lesion_probability"
    firsts, seconds = ([float(row[column]) for row in rows] for rows in alone)
    assert firsts != pytest.approx(seconds, abs=1e-3)
    means = [(one + other) / 2 for one, other in zip(firsts, seconds)]
    assert [float(row[column]) for row in predictions(out)] == pytest.approx(means, abs=1e-5)


def test_a_checkpoint_is_no_ensemble_with_itself(run, monkeypatch, capsys):
    last = run / "checkpoints" / "last"
    line = refused(monkeypatch, capsys, "--checkpoint", run, last)
    assert "are the same checkpoint" in line and str(last.resolve()) in line


def member(images, labels, names=("Mass", "Hernia"), path="runs/a"):
    records = SimpleNamespace(table={"image": images}, labels=np.array(labels))
    match = LabelMatch.same(list(names))
    return SimpleNamespace(checkpoint=path, match=match, records=lambda split: records)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (member(["b", "a"], [[0, 1], [1, 1]]), "the same images, in another order"),
        (member(["a", "c", "d"], [[0, 1]] * 3), "3 images there, 2 here, 1 in both"),
        (member(["a", "b"], [[0, 1], [1, 0]]), "the images are the same, their labels are not"),
        (member(["a", "b"], [[1], [0]], ["Mass"]), r"their labels differ \(Hernia\)"),
        (
            member(["a", "b"], [[1, 0], [1, 1]], ["Hernia", "Mass"]),
            r"their labels differ \(their order\)",
        ),
    ],
)
def test_what_differs_between_members_is_named(other, reason):
    first = member(["a", "b"], [[0, 1], [1, 1]])
    members._check_same(first, first, "test")
    other.checkpoint = "runs/b"
    with pytest.raises(ConfigError, match=f"runs/b scores other test data than runs/a: {reason}"):
        members._check_same(first, other, "test")


def test_a_member_without_the_split_is_named(make_config):
    config = make_config("data.split=patient", "data.test_fraction=0")
    one = members.Member.__new__(members.Member)
    one.checkpoint, one.data = "runs/b", cxr_vit.ChestXrayDataModule(config)
    with pytest.raises(DataError, match=r"^runs/b: "):
        one.records("test")


def test_scoring_at_another_size_than_the_training_is_recorded(call):
    metrics, _, log = call("--split", "val", "data.resize=40", folder="report_val")
    assert metrics["changed_since_training"] == ["read_size"]
    assert "images are read at 40 pixels, and those of the training were at 32" in log


def test_members_must_score_the_same_images(run, sample_root, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "third"
    words = [*SMALL, f"data.root={sample_root}", "train.steps=1", f"run.dir={folder}"]
    assert train.main([*words, "data.split=patient", "data.split_seed=5"]) == 0
    capsys.readouterr()
    line = refused(monkeypatch, capsys, "--checkpoint", run, folder)
    assert "scores other test data than" in line and "images there" in line
    assert not (run / "report-ensemble" / "metrics.json").exists()
