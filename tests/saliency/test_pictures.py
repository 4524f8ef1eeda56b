"""Pictures that the commands write: `predict --saliency` and the report of evaluate.py."""

import re
import shutil
import xml.etree.ElementTree as ElementTree
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SMALL
from cxr_vit import ViTModule, cli
from cxr_vit.checkpoint_files import checkpoint_of
from cxr_vit.commands import evaluate, predict_arguments, train
from cxr_vit.config import Config
from cxr_vit.data.images import read_gray, read_original
from cxr_vit.data.views import CENTER
from cxr_vit.errors import ConfigError
from cxr_vit.evaluation.predictions import read_predictions
from cxr_vit.saliency import maps
from cxr_vit.saliency.overlay import beside, overlay
from fakes import loading

#: On the stand-in for PopTorch.
IPU = (
    *("engine.name=poptorch", "engine.device=auto", "engine.executable_cache=null"),
    *("pipeline.layers_per_stage=[2, 2]", "batch.gradient_accumulation=8"),
    *("batch.eval_micro_batch_size=2", "batch.eval_device_iterations=2"),
)
CROPPED = ("data.resize=40", "data.image_size=32")


@pytest.fixture(scope="module")
def run(sample_root, tmp_path_factory):
    """A run of one step on images of which the model sees the middle."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = [*SMALL, *CROPPED, f"data.root={sample_root}", "train.steps=1", f"run.dir={folder}"]
    assert train.main([*words, "schedule.warmup_steps=0"]) == 0
    return folder


@pytest.fixture(scope="module")
def files(sample_root, tmp_path_factory):
    """A wide image, one of the sample, and one that is damaged."""
    folder = tmp_path_factory.mktemp("files")
    source = sorted((sample_root / "images").iterdir())[0]
    Image.open(source).resize((90, 60)).save(folder / "a wide.png")
    shutil.copy(source, folder / "b.png")
    (folder / "c.png").write_bytes(source.read_bytes()[:100])
    return folder


def predict(*words):
    return cli.main(["predict", *map(str, words)])


def expected_picture(run, path, name, method):
    module = ViTModule.load_from_checkpoint(checkpoint_of(run))
    module.setup()
    pixels = read_gray(path, 40)
    seen = torch.from_numpy(CENTER.of(pixels[None], 32))[None]
    values = method(module.model.eval(), seen, [module.names.index(name)])[0, 0].numpy()
    original = read_original(path)
    return np.asarray(beside(original, overlay(original, values, CENTER.box(40, 32))))


@pytest.mark.parametrize(
    ("method", "engine"), [("relevance", ["engine.precision=bf16"]), ("grad_cam", IPU)]
)
def test_pictures_show_the_given_findings_of_each_image(run, files, tmp_path, method, engine):
    """They are of fp32 on torch, whatever the engine."""
    words = ["--saliency", tmp_path / "out", "--saliency-method", method]
    with torch.random.fork_rng(devices=[]), loading.stand_in():
        status = predict(run, files, *engine, *words, "--findings", "Mass", "Hernia")
    assert status == cli.EXIT_PARTIAL, "the damaged one"
    found = sorted((tmp_path / "out").iterdir())
    patterns = [
        rf"00000{number}_{stem}_{name}_0\.\d{{3}}\.png"
        for number, stem in enumerate(("a_wide", "b"))
        for name in ("Hernia", "Mass")
    ]
    assert len(found) == 4
    assert all(re.fullmatch(*each) for each in zip(patterns, (path.name for path in found)))
    picture = Image.open(found[1])
    assert picture.size == (181, 60) and picture.info == {}
    expected = expected_picture(run, files / "a wide.png", "Mass", maps.METHODS[method])
    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1


def test_without_findings_the_likeliest_one_is_shown(run, files, tmp_path, capsys):
    words = [run, files / "b.png", "--saliency", tmp_path / "out"]
    assert predict(*words) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "out").iterdir()
    highest, probability = re.search(r"highest (\w+) (0\.\d\d)", printed).groups()
    assert path.name.startswith(f"000000_b_{highest}_{probability[:3]}")
    with pytest.raises(Exception, match="is not empty"):
        predict(*words)


def test_each_method_can_be_chosen():
    chosen = Config.model_fields["report"].annotation.model_fields["saliency"].annotation
    assert [*maps.METHODS, "none"] == list(get_args(chosen))
    assert list(predict_arguments._MAPS) == list(maps.METHODS)


def test_mistakes_are_named(run, files, tmp_path):
    out = ("--saliency", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--findings mass: .* Did you mean 'Mass'\?"):
        predict(run, files, *out, "--findings", "mass")
    with pytest.raises(ConfigError, match="Add --saliency DIR"):
        predict(run, files, "--findings", "Mass")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ConfigError, match="--saliency needs gradients"):
        predict(tmp_path / "model.onnx", files, *out)
    assert not (tmp_path / "out").exists()


def report(checkpoints, out, *overrides):
    """Return the page of a report, and how many of its pictures are images and overlays."""
    words = ["--checkpoint", *map(str, checkpoints), "--out", str(out), "evaluation.resamples=0"]
    assert evaluate.main([*words, *overrides]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    pictures = [image.get("src") for image in ElementTree.fromstring(page).iter("img")]
    return page, *(sum(f"/{kind};" in each for each in pictures) for kind in ("png", "jpeg"))


def test_report_has_an_overlay_of_each_case(run, tmp_path):
    """Of an ensemble, by the first of its checkpoints."""
    shutil.copytree(run, tmp_path / "other")
    given = [run, tmp_path / "other"], tmp_path / "out", "evaluation.views=flip"
    page, images, overlays = report(*given)
    assert images == overlays > 10
    assert "the score of the first checkpoint of the ensemble rests on, of the middle" in page
    assert "attention relevance (Chefer" in page and "no segmentation" in page


def test_failure_of_a_map_loses_no_scores(run, tmp_path, monkeypatch, caplog):
    def fail(*_given):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(maps.METHODS, "relevance", fail)
    page, images, overlays = report([run], tmp_path / "out")
    assert images > 10 and overlays == 0 and "segmentation" not in page
    assert len(read_predictions(tmp_path / "out" / "predictions.csv")) > 10
    assert [each for each in caplog.messages if "out of memory" in each] == [
        "the report shows no maps (report.saliency): out of memory"
    ]
