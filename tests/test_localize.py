"""The command `localize` on a run of one step: files, output, places of boxes, mistakes."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import QUICK, SMALL
from cxr_vit import ViTModule, cli
from cxr_vit.commands import localize_run, train
from cxr_vit.commands.localize_run import _with_boxes
from cxr_vit.data.synthetic.dataset import BOX_NAME, write_sample
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.evaluation.localization_figure import localization_figure
from cxr_vit.saliency.maps import METHODS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A synthetic data set with boxes of more than 10 test patients."""
    root = tmp_path_factory.mktemp("data") / "sample"
    write_sample(root, num_images=320, image_size=32, seed=0)
    return root


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = [*SMALL, *QUICK, f"data.root={root}", "train.steps=1", f"run.dir={folder}"]
    assert train.main(words) == 0
    return folder


@pytest.fixture
def localize(run, tmp_path, capsys):
    """Run the command; return the content of localization.json and the output."""

    def localized(*words):
        out = tmp_path / "out"
        words = [str(run), "evaluation.resamples=40", *words]
        assert cli.main(["localize", *words, "--out", str(out)]) == 0
        return json.loads((out / "localization.json").read_text()), capsys.readouterr().out

    return localized


def weights_of(run):
    return (run / "checkpoints" / "best" / "model.safetensors").read_bytes()


def test_files_and_output(run, localize, tmp_path):
    before = weights_of(run)
    found, output = localize("--sanity", "3")
    assert found["schema_version"] == 1
    assert (found["method"], found["split"], found["step"]) == ("relevance", "test", 1)
    assert found["changed_since_training"] == []
    counts, value = found["counts"], found["scores"]["maps"]["pointing_game"]["all"]
    assert counts["pairs"] == sum(each["pairs"] for each in counts["findings"].values())
    assert counts["patients"] >= 10
    assert value["low"] <= value["value"] <= value["high"]
    change = found["differences"]["center"]["iou"]["all"]["value"]
    iou = {name: each["iou"]["all"]["value"] for name, each in found["scores"].items()}
    assert set(iou) == {"maps", "center", "random"}
    assert change == pytest.approx(iou["maps"] - iou["center"])
    steps = [step["randomised"] for step in found["sanity"]["steps"]]
    assert steps == ["head", *(f"layer {number}" for number in (3, 2, 1, 0)), "embedding"]
    assert found["sanity"]["images"] == 3
    first, *_, last = (step["correlation"]["value"] for step in found["sanity"]["steps"])
    assert -1 < first < 0.99 and -1 < last < 0.9
    # A finding with few patients.
    assert re.search(r"no interval of a score \(less than 10 patients.*\w", output)
    for text in ("mean of findings", "difference to", "layer 3", found["notice"]):
        assert text in output
    with Image.open(tmp_path / "out" / "localization.png") as picture:
        assert picture.size[0] > 1000
    # The same call gives the same file; the checkpoint is as it was.
    assert localize("--sanity", "3")[0] == found
    assert weights_of(run) == before


def test_some_images_with_the_other_method_and_no_figure(run, localize, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "localization.png").write_text("of an earlier call")
    words = ("--method", "grad_cam", "--images", "4", "--sanity", "0", "report.images=false")
    found, output = localize(*words)
    assert (found["method"], found["counts"]["images"], found["sanity"]) == ("grad_cam", 4, None)
    assert found["counts"]["pairs_not_chosen"] > 0
    assert found["scores"]["maps"]["iou"]["all"]["low"] is None
    assert "no intervals: they need 10 patients" in output
    assert [path.name for path in out.iterdir()] == ["localization.json"]


def test_default_folders_are_in_the_run(run):
    """Scores of some images, or of other ones, never replace those of the default."""
    few = ("--sanity", "0", "report.images=false", "evaluation.resamples=0")
    for words, name in (
        ((), "localization"),
        (("--images", "1", "--method", "grad_cam"), "localization_grad_cam_1_images"),
    ):
        assert cli.main(["localize", str(run), *few, *words]) == 0
        assert (run / name / "localization.json").is_file()
    other = refused(ConfigError, run, *few, "data.split=patient", "data.test_fraction=0.5")
    assert "(split_sha256, split_kind)" in other and f"{run / 'localization'} is for" in other


@pytest.mark.parametrize("words", [(), ("data.resize=80",)], ids=["whole", "cut"])
def test_boxes_are_where_the_model_sees_them(run, localize, root, tmp_path, monkeypatch, words):
    """Of images with a brightness of the finding in its box, the map of brightness finds it.

    That of another finding has one value everywhere. The figure has the hits of the maps.
    """
    white = tmp_path / "white"
    shutil.copytree(root, white)
    boxes = pd.read_csv(root / BOX_NAME)
    boxes = boxes[boxes["Finding Label"].isin(["Cardiomegaly", "Effusion", "Atelectasis"])]
    boxes = boxes.drop_duplicates("Image Index")
    boxes.to_csv(white / BOX_NAME, index=False)
    names = ViTModule.load_from_checkpoint(run).names
    for image, finding, x, y, width, height in boxes.iloc[:, :6].to_numpy():
        pixels = np.zeros((1024, 1024), np.uint8)
        inside = 100 + 10 * names.index(finding)
        pixels[round(y) : round(y + height), round(x) : round(x + width)] = inside
        (found,) = (white / "images").rglob(image)
        Image.fromarray(pixels).save(found, compress_level=1)

    def brightness(model, images, columns):
        (column,) = columns
        highest = images.amax(dim=(2, 3), keepdim=True).to(torch.float32)
        return images * ((highest - 100 - 10 * column).abs() < 5)

    shown = []

    def keep(pairs, images, maps, hits, title):
        shown.append((pairs, images, maps, hits, title))
        return localization_figure(pairs, images, maps, hits, title)

    monkeypatch.setitem(METHODS, "relevance", brightness)
    monkeypatch.setattr(localize_run, "localization_figure", keep)
    words = (f"data.root={white}", "data.cache=off", *words)
    found, _ = localize("--sanity", "0", *words)
    assert found["counts"]["pairs"] > 5
    scores = {name: each["all"]["value"] for name, each in found["scores"]["maps"].items()}
    assert scores["pointing_game"] == 1.0
    assert scores["iou"] > 0.8
    assert found["scores"]["center"]["pointing_game"]["all"]["value"] < 1.0
    ((pairs, images, maps, hits, title),) = shown
    assert len(pairs) > 5 and (hits == 1.0).all() and (maps == images).all()
    assert re.match(r"relevance of \w+, step_00000001: boxes", title)


def test_sanity_check_compares_maps_of_the_same_pairs(localize, monkeypatch):
    """Those of weights that are not randomised are the same, but for the rounding."""
    monkeypatch.setattr(localize_run, "cascade", lambda model: [("nothing", model)])
    found, output = localize("--sanity", "3", "report.images=false")
    (step,) = found["sanity"]["steps"]
    assert step["correlation"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert re.search(r"  nothing +1\.00\b", output)


def test_damaged_weights_are_refused(run, localize, monkeypatch):
    def nothing(model, images, columns):
        return torch.full((len(images), 1, 4, 4), float("nan"))

    monkeypatch.setitem(METHODS, "relevance", nothing)
    with pytest.raises(cli.CxrVitError, match="maps are not finite"):
        localize()


def refused(error, *words):
    with pytest.raises(error) as raised:
        cli.main(["localize", *map(str, words)])
    return str(raised.value)


def test_data_without_boxes(run, root, make_config, tmp_path):
    assert "data.boxes=none" in refused(DataError, run, "data.boxes=none")
    assert "Boxes by split: train 0, val 0, test" in refused(DataError, run, "--split", "val")
    without = tmp_path / "without"
    shutil.copytree(root, without)
    (without / BOX_NAME).unlink()
    message = refused(DataError, run, f"data.root={without}")
    assert f"{without} has none of {BOX_NAME}" in message
    assert "data.boxes" in message
    with pytest.raises(DataError, match="format=table has none"):
        _with_boxes(make_config("data.image_size=32").changed(data={"format": "table"}))
    (without / BOX_NAME).write_text("image,x\n")
    assert BOX_NAME in refused(DataError, run, f"data.root={without}")


def test_mistakes_on_the_command_line(run, monkeypatch):
    assert "a checkpoint or of a run first" in refused(ConfigError)
    assert "give 1 or more" in refused(ConfigError, run, "--images", "0")
    assert "give 0 or more" in refused(ConfigError, run, "--sanity", "-1")
    assert "invalid choice: 'lime'" in refused(ConfigError, run, "--method", "lime")
    assert "is not a checkpoint" in refused(cli.CxrVitError, run.parent)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(ConfigError, run)


def test_a_mistake_has_no_traceback(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cxr-vit", "localize", str(run), "data.boxes=none"])
    with pytest.raises(SystemExit) as ended:
        cli.console()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("DataError: localize compares maps with boxes")
