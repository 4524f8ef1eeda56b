import csv
import io
import json
import resource

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.text_files import csv_line, original_text, write_csv
from cxr_vit.errors import DataError
from cxr_vit.evaluation.bootstrap import Resamples
from cxr_vit.evaluation.metrics import EvalOutputs
from cxr_vit.evaluation.page import PageContext
from cxr_vit.evaluation.predictions import predictions_of
from cxr_vit.evaluation.report import print_table, write_report
from cxr_vit.files import make_folder


def write_scored(folder, records, labels, *, logits=None, names=FINDINGS, **origin):
    """Write the report of these labels, which are also the logits by default."""
    logits = labels if logits is None else logits
    outputs = EvalOutputs("test", 12, 0.7, {}, logits, labels, 1.0, names)
    predictions = predictions_of(records, outputs)
    context = PageContext("a run", "", {})
    return write_report(folder, predictions, context, resamples=Resamples(50), origin=origin)


@pytest.fixture
def dataset(make_config):
    return ChestXrayDataModule(make_config()).dataset("test")


@pytest.fixture
def report(dataset, tmp_path):
    labels = torch.from_numpy(dataset.records.labels).float()
    labels[:, 13] = 0
    dataset.records.labels[:, 13] = 0
    logits = torch.randn(labels.shape, generator=torch.Generator().manual_seed(0))
    metrics = write_scored(tmp_path / "report", dataset.records, labels, logits=logits, step=12)
    return tmp_path / "report", metrics, logits, labels


def test_folder_has_metrics_predictions_and_plots(report):
    folder = report[0]
    names = {path.name for path in folder.iterdir()}
    tables = {"metrics.json", "predictions.csv"}
    assert names == {*tables, "report.html", "MODEL_CARD.md", "roc.png", "roc.svg"}


def test_metrics_have_the_documented_keys(report, dataset):
    written = json.loads((report[0] / "metrics.json").read_text())
    assert written == report[1]
    assert (written["split"], written["num_samples"]) == ("test", len(dataset))
    assert written["auroc"]["Hernia"] is None
    assert list(written["auroc"]) == list(FINDINGS)
    assert (written["auroc_defined"], written["step"]) == (13, 12)
    assert "research" in written["notice"]


def test_predictions_have_one_row_per_image_in_the_order_of_the_split(report, dataset):
    folder, _, logits, labels = report
    table = pd.read_csv(folder / "predictions.csv")
    assert list(table.columns[:5]) == [
        "image",
        "patient",
        "split",
        "Atelectasis",
        "Atelectasis_probability",
    ]
    assert table["image"].tolist() == dataset.image_names
    assert table["patient"].tolist() == dataset.records.table["patient"].tolist()
    assert set(table["split"]) == {"test"}
    for column, name in enumerate(FINDINGS):
        assert table[name].tolist() == labels[:, column].tolist()
        expected = torch.sigmoid(logits[:, column]).numpy()
        assert np.allclose(table[f"{name}_probability"], expected, atol=1e-6)


def test_metrics_can_be_computed_from_the_predictions(report):
    folder, metrics, *_ = report
    table = pd.read_csv(folder / "predictions.csv")
    ranks = table["Effusion_probability"].rank()
    positive = table["Effusion"] == 1
    count = positive.sum()
    statistic = ranks[positive].sum() - count * (count + 1) / 2
    auroc = statistic / (count * (len(table) - count))
    assert auroc == pytest.approx(metrics["auroc"]["Effusion"], abs=1e-6)


def test_table_has_undefined_findings_and_the_number_of_defined_ones(report):
    console = Console(file=io.StringIO(), width=80)
    print_table(report[1], console)
    text = console.file.getvalue()
    assert "(13 of 14 findings)" in text
    assert "undefined (no positive or no negative image): Hernia" in text
    assert "Pleural_Thickening" in text, "no name is cut at 80 columns"
    assert "research only" in text


def test_unknown_labels_are_empty_cells_and_a_column_of_the_table(dataset, tmp_path):
    records = dataset.records
    records.labels[:] = np.arange(len(records))[:, None] % 2
    records.labels[::4, 2:] = -1
    records.labels[:, 5] = -1
    labels = torch.from_numpy(records.labels).float()
    metrics = write_scored(tmp_path, records, labels)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    for index, row in enumerate(rows):
        odd = str(index % 2)
        assert row["Cardiomegaly"] == odd, "known"
        assert row["Effusion"] == ("" if index % 4 == 0 else odd)
        assert row["Nodule"] == ""
        assert 0 < float(row["Nodule_probability"]) < 1
    assert metrics["unknown"]["Effusion"] == 5
    console = Console(file=io.StringIO(), width=80)
    print_table(metrics, console)
    table = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    cells = {line[0]: line[1:] for line in table if line}
    assert cells["Atelectasis"] == ["10", "1.0000", "1.0000", "0.5000", "0"]
    assert cells["Effusion"][-2:] == ["0.6667", "5"], "of the known ones"
    assert cells["Nodule"] == ["0", "-", "-", "-", "20"]
    assert "unknown" in console.file.getvalue()


def test_roc_plot_has_a_curve(report):
    with Image.open(report[0] / "roc.png") as image:
        assert image.width >= 1200
        colours = image.convert("RGB").getcolors(maxcolors=1 << 20)
    assert any(blue > 1.3 * red for _, (red, _, blue) in colours), "matplotlib's first colour"


FORMULAS = ["=1.png", "@SUM(1).png", "+1.png", "-1.png", "\t=1.png", "'=1.png", "\uff1d1.png"]


def test_names_that_look_like_formulas_are_safe_in_a_spreadsheet(dataset, tmp_path):
    records = dataset.records
    names = [*FORMULAS, *records.table["image"][len(FORMULAS) :]]
    records.table["image"] = names
    labels = torch.from_numpy(records.labels).float()
    write_scored(tmp_path, records, labels, names=["=finding", *FINDINGS[1:]])
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        text = file.read()
    table = pd.read_csv(io.StringIO(text))
    assert not [cell for cell in [*table["image"], *table.columns] if cell[0] in "=+-@\t\r\n\uff1d"]
    assert [original_text(cell) for cell in table["image"]] == names
    assert "'=finding" in table.columns
    assert text.splitlines()[1].startswith('"\'=1.png",')
    assert table.dtypes["patient"] == "int64"


def test_cells_of_a_csv_keep_their_meaning():
    texts = ["a", "a,b", 'a "b"', "it's", "", "a;=1", "two\nlines", *FORMULAS]
    line = csv_line([*texts, -1, -0.5, 1e-07, None, float("nan")])
    (cells,) = csv.reader(io.StringIO(line, newline=""))
    assert [original_text(cell) for cell in cells[: len(texts)]] == texts
    assert cells[len(texts) :] == ["-1", "-0.5", "1e-07", "", ""]
    assert '"a;=1"' in line, "quoted, for programs that separate at semicolons"


def test_name_that_is_not_utf8_is_written_with_escapes(tmp_path):
    write_csv(tmp_path / "skipped.csv", pd.DataFrame({"image": ["\udcff.png"]}, dtype=object))
    assert (tmp_path / "skipped.csv").read_bytes() == b"image\n\\udcff.png\n"


# Folders that cannot be written, and links


def write(folder, dataset):
    labels = torch.from_numpy(dataset.records.labels).float()
    return write_scored(folder, dataset.records, labels, logits=torch.zeros(labels.shape))


def test_report_replaces_links_and_does_not_follow_them(report, dataset, tmp_path):
    folder, precious = report[0], tmp_path / "precious"
    precious.write_text("precious")
    names = [path.name for path in folder.iterdir()]
    for name in names:
        (folder / name).unlink()
        (folder / name).symlink_to(precious)
    write(folder, dataset)
    assert precious.read_text() == "precious"
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_folder_in_the_run_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "report"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"written to {link} \(a symbolic link\).* --out"):
        make_folder(None, link)
    assert make_folder(link, tmp_path / "other") == link, "given with --out"


def test_folder_that_cannot_be_made_is_one_line(dataset, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "report"):
        for attempt in (lambda: make_folder(None, folder), lambda: write(folder, dataset)):  # noqa: B023
            with pytest.raises(DataError, match=rf"written to {folder} \(.* --out") as raised:
                attempt()
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [0, 5000])
def test_full_disk_is_one_line_and_leaves_no_partial_report(dataset, tmp_path, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(DataError, match=r"written to .* \(File too large\).* --out"):
            write(tmp_path / "report", dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics.json" not in {path.name for path in (tmp_path / "report").iterdir()}


def test_folder_without_permission_is_noticed_before_scoring(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied", "random name")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(DataError, match=rf"written to {tmp_path} \(Permission denied\).* --out"):
        make_folder(tmp_path, tmp_path)


def test_names_of_labels_are_no_markup(dataset, tmp_path):
    names = ["Mass [/]", "Mass [left]"]
    labels = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    records = dataset.records.take(np.arange(2))
    metrics = write_scored(tmp_path, records, labels, names=names)
    console = Console(file=io.StringIO(), width=80)
    print_table(metrics, console)
    text = console.file.getvalue()
    assert "Mass [/] " in text and "negative image): Mass [left]" in text
