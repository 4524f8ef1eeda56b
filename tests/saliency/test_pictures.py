"""Pictures that the commands write: `predict --saliency` and the report of evaluate.py."""

import re
import shutil
import warnings
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SMALL
from cxr_vit import ViTModule, cli
from cxr_vit.checkpoint_files import checkpoint_of
from cxr_vit.commands import evaluate, train
from cxr_vit.commands.case_overlays import case_overlays
from cxr_vit.commands.checkpoint_predictor import Opened
from cxr_vit.commands.map_model import explainer_of, map_model
from cxr_vit.commands.saliency_pictures import saliency_pictures
from cxr_vit.config import load_config
from cxr_vit.config.schema import MAP_METHODS
from cxr_vit.data.images import read_gray, read_original
from cxr_vit.data.views import CENTER
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.evaluation.label_match import LabelMatch
from cxr_vit.evaluation.predictions import read_predictions
from cxr_vit.prediction.run import Predicted
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


def test_model_of_maps_is_in_fp32_and_evaluation(run):
    """Also that of a run in fp16, which old versions of torch do not compute on a CPU."""
    config = load_config([run / "config.yaml"], ["engine.precision=fp16"])
    module = ViTModule.load_from_checkpoint(checkpoint_of(run), config=config)
    module.setup()
    model = map_model(module.train())
    assert not any(part.training for part in model.modules())
    assert model.dtype == torch.float32
    explainer = explainer_of(checkpoint_of(run), config, "grad_cam")
    assert explainer() is explainer()


def test_read_only_pixels_are_no_reason_for_a_warning(run):
    """The model sees all of them, so that nothing else copies them."""
    config = load_config([run / "config.yaml"], ["data.resize=32"])
    explainer = explainer_of(checkpoint_of(run), config, "grad_cam")()
    picture = Image.new("L", (32, 32))
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(explainer.overlays(picture, np.asarray(picture), [2, 3])) == 2
    finally:
        torch.set_warn_always(False)


def test_highest_is_of_the_given_columns(run):
    explainer = explainer_of(
        checkpoint_of(run), load_config([run / "config.yaml"], []), "relevance"
    )()
    pixels = np.full((40, 40), 90, np.uint8)
    with torch.no_grad():
        logits = explainer._model(torch.full((1, 1, 32, 32), 90, dtype=torch.uint8))[0].tolist()
    order = sorted(range(14), key=logits.__getitem__)
    assert explainer.highest(pixels, order) == order[-1]
    assert explainer.highest(pixels, order[3:9]) == order[8]
    assert explainer.highest(pixels, [order[0]]) == order[0]


def test_without_findings_the_likeliest_one_is_shown(run, files, tmp_path, capsys):
    words = [run, files / "b.png", "--saliency", tmp_path / "out"]
    assert predict(*words) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "out").iterdir()
    highest, probability = re.search(r"highest (\w+) (0\.\d\d)", printed).groups()
    assert path.name.startswith(f"000000_b_{highest}_{probability[:3]}")
    with pytest.raises(DataError, match=r"--saliency .*out is not empty"):
        predict(*words)


def test_findings_over_their_threshold_are_shown(run, files, tmp_path):
    module = ViTModule.load_from_checkpoint(checkpoint_of(run))
    write = saliency_pictures(
        tmp_path / "out", Opened(None, module), method="grad_cam", findings=[], resumes=False
    )
    pixels, scores = np.stack([read_gray(files / "b.png", 40)] * 3), np.full((3, 14), 0.5)
    scores[:, module.names.index("Edema")] = 0.9
    usable, paths = np.array([True, False, True]), [str(files / "b.png")] * 3
    over = [["Hernia", "Mass"], ["Mass"], []]
    write(Predicted(7, paths, usable, pixels, scores, over, []))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("000007_b_Hernia_0.500.png", "000007_b_Mass_0.500.png", "000009_b_Edema_0.900.png")
    ]


def fail(*_given):
    raise RuntimeError("out of memory")


def test_failure_of_a_picture_loses_no_rows(run, files, tmp_path, monkeypatch, caplog):
    out = tmp_path / "rows.csv"
    words = (run, files / "b.png", files / "a wide.png", "--out")
    assert predict(*words, out) == 0
    pictures = ("--saliency", tmp_path / "looks", "--preprocess-check", tmp_path / "seen")
    with monkeypatch.context() as patched:
        patched.setitem(maps.METHODS, "relevance", fail)
        assert predict(*words, tmp_path / "other.csv", *pictures) == cli.EXIT_PARTIAL
    assert (tmp_path / "other.csv").read_bytes() == out.read_bytes()
    expected = f"--saliency {tmp_path / 'looks'}: no more pictures, only rows: out of memory"
    assert [text for text in caplog.messages if "pictures" in text] == [expected]
    assert len(list((tmp_path / "seen").iterdir())) == 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ((), "options.saliency"),
        (("--saliency", "looks"), "options.saliency.findings"),
        (("--saliency", "others", "--findings", "Mass"), "options.saliency.pictures"),
        (
            ("--saliency", "looks", "--findings", "Mass", "--saliency-method", "grad_cam"),
            "options.saliency.method",
        ),
    ],
)
def test_rows_are_not_continued_with_other_pictures(
    run, files, tmp_path, monkeypatch, changed, named
):
    monkeypatch.chdir(tmp_path)
    words = (run, files / "b.png", "--out", "rows.csv", "--resume")
    given = ("--saliency", "looks", "--findings", "Mass")
    assert predict(*words, *given) == 0
    with pytest.raises(DataError, match=rf"other settings.*: {named}\b"):
        predict(*words, *changed)
    assert predict(*words, *given) == 0


def test_overlay_of_the_report_is_of_the_finding_and_the_method(run):
    config = load_config([run / "config.yaml"], ["report.saliency=grad_cam"])
    module = ViTModule.load_from_checkpoint(checkpoint_of(run))
    overlays = case_overlays(
        checkpoint_of(run), config, LabelMatch.same(module.names), is_ensemble=False
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8))
    explainer = explainer_of(checkpoint_of(run), config, "grad_cam")()
    expected = [
        explainer.overlays(picture, np.array(picture), [module.names.index(name)])[0].tobytes()
        for name in ("Mass", "Hernia")
    ]
    assert [overlays.draw(picture, name).tobytes() for name in ("Mass", "Hernia")] == expected
    assert expected[0] != expected[1] and "Grad-CAM" in overlays.about


def test_each_method_can_be_chosen():
    assert list(MAP_METHODS) == list(maps.METHODS)


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
    monkeypatch.setitem(maps.METHODS, "relevance", fail)
    page, images, overlays = report([run], tmp_path / "out")
    assert images > 10 and overlays == 0 and "segmentation" not in page
    assert len(read_predictions(tmp_path / "out" / "predictions.csv")) > 10
    assert [each for each in caplog.messages if "out of memory" in each] == [
        "the report shows no maps (report.saliency): out of memory"
    ]
