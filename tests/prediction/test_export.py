"""The command `export`: files, parity, manifest, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
import torch
from random_run import save_run
from transformers import AutoImageProcessor, AutoModelForImageClassification

import families
from conftest import ROOT
from cxr_vit import Trainer
from cxr_vit.cli import main
from cxr_vit.data.labels import FINDINGS
from cxr_vit.errors import (
    CheckpointError,
    ConfigError,
    CxrVitError,
    DataError,
    EngineUnavailable,
    ModelError,
)
from cxr_vit.evaluation.operating_points import OperatingPoints
from cxr_vit.model.module import ViTModule
from cxr_vit.prediction.manifest import Manifest
from cxr_vit.prediction.onnx_model import open_onnx
from cxr_vit.prediction.parity import CheckpointScorer
from cxr_vit.training.run_folder import config_of_checkpoint

pytest.importorskip("onnxruntime")

ENGINE = ["engine.device=cpu", "engine.precision=fp32"]


@pytest.fixture
def run(sample_root: Path, tmp_path: Path) -> Path:
    """A run with operating points and the report of its checkpoint."""
    folder = tmp_path / "run"
    module = save_run("vit", folder, f"data.root={sample_root}", "data.val_fraction=0.2")
    checkpoint = folder / "checkpoints" / "best"
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    facts = [[digest, [[column] for column in range(len(module.names))], 40, "center"]]
    fitted_on = {"split": "val", "images": 16, "patients": 4, "sha256": ""}
    fitted_on["model_sha256"] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    values: Any = {"format": 1, "labels": module.names, "fitted_on": fitted_on, "platt": {}}
    thresholds = {module.names[1]: {"youden": 0.25}}
    points = OperatingPoints(**values, thresholds=thresholds, temperature={module.names[0]: 2.0})
    points.write(checkpoint / "operating_points.json")
    (folder / "report").mkdir()
    (folder / "report" / "metrics.json").write_text('{"step": 0}')
    (folder / "report" / "MODEL_CARD.md").write_text("# The card of the report")
    return folder


def export(run: Path, to: str, *words: Any) -> Path:
    assert main(["export", str(run), "--to", to, *map(str, words)]) == 0
    return run / f"export-{to}"


def manifest_of(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / "manifest.json").read_text())


def test_onnx_file_equals_the_checkpoint_and_says_what_it_is(run: Path, capsys: Any) -> None:
    folder = export(run, "onnx", "--split", "test")
    output = capsys.readouterr().out
    assert "parity over 20 test images: largest difference " in output

    path, manifest = folder / "model.onnx", manifest_of(folder)
    assert sorted(item.name for item in folder.iterdir()) == ["manifest.json", "model.onnx"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest.onnx_sha256 == digest
    assert manifest.parity.images == 20
    assert manifest.parity.largest_difference <= 1e-4
    checkpoint = run / "checkpoints" / "best"
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert manifest.weights_sha256 == hashlib.sha256(weights).hexdigest()

    predictor = open_onnx(path)  # the file alone is enough
    facts = predictor.facts
    assert facts.identity == {"onnx_sha256": digest}
    assert (facts.labels, facts.image_size) == (list(FINDINGS), 32)
    assert facts.settings.image_size == 40
    assert facts.points == OperatingPoints.read(checkpoint / "operating_points.json")
    assert "MB, 14 labels, with operating points\n" in output


def test_onnx_file_scores_image_files_as_the_torch_engine_does(
    run: Path, sample_root: Path
) -> None:
    predictor = open_onnx(export(run, "onnx", "--images", "3") / "model.onnx")
    paths = sorted(map(str, sample_root.rglob("*.png")))[:5]
    config = config_of_checkpoint(run / "checkpoints" / "best", ENGINE)
    module = ViTModule.load_from_checkpoint(run, config=config)
    expected = Trainer(config).predict(module, paths)
    images = np.stack([predictor.facts.settings.decode(path) for path in paths])
    found = predictor.probabilities(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)


def test_example_of_the_page_prints_the_probabilities(
    run: Path, sample_root: Path, capsys: Any
) -> None:
    path = export(run, "onnx", "--images", "3") / "model.onnx"
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    image = sorted(sample_root.rglob("*.png"))[0]
    for written, here in (
        ("runs/<name>/export-onnx/model.onnx", path),
        ("data/sample", sample_root),
    ):
        assert written in block
        block = block.replace(written, str(here))
    capsys.readouterr()
    exec(compile(block, "docs/export.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    predictor = open_onnx(path)
    (expected,) = predictor.probabilities(predictor.facts.settings.decode(str(image))[None])
    assert lines == [f"{name}: {value:.4f}" for name, value in zip(FINDINGS, expected)]


def test_images_of_the_comparison(run: Path, capsys: Any) -> None:
    folder = export(run, "onnx", "--images", "3")
    assert manifest_of(folder).parity.split == "val"
    assert "parity over 3 val images" in capsys.readouterr().out
    export(run, "onnx", "data.root=/nowhere")  # the earlier export is replaced
    assert manifest_of(folder).parity.split == "random"
    output = capsys.readouterr().out
    assert "noise is compared" in output
    assert "parity over 64 random images" in output
    with pytest.raises(DataError, match="/nowhere"):
        export(run, "onnx", "--split", "val", "data.root=/nowhere")


def test_points_of_other_views_are_left_out(run: Path, caplog: Any) -> None:
    folder = export(run, "onnx", "--images", "3", "evaluation.views=flip")
    assert "is not used: it was fitted with other" in caplog.text
    assert manifest_of(folder).points is None
    assert manifest_of(folder).views == "flip"


def test_difference_keeps_the_earlier_export(run: Path, monkeypatch: Any) -> None:
    folder = export(run, "onnx", "--images", "3")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    true = CheckpointScorer.probabilities
    monkeypatch.setattr(
        CheckpointScorer, "probabilities", lambda self, images: true(self, images) + 2e-4
    )
    with pytest.raises(ModelError, match="Nothing was kept"):
        export(run, "onnx", "--images", "3")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_plain_transformers_loads_the_folder(kind: str, tmp_path: Path, capsys: Any) -> None:
    module = save_run(kind, tmp_path / "run", "data.root=/nowhere")
    folder = export(tmp_path / "run", "hf")
    assert "parity over 64 random images" in capsys.readouterr().out
    plain = AutoModelForImageClassification.from_pretrained(str(folder)).eval()
    images = families.images(32, 5)
    with torch.no_grad():
        logits, expected = plain(pixel_values=families.pixels(images)).logits, module(images)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    processor = AutoImageProcessor.from_pretrained(str(folder), use_fast=False)
    image = np.repeat(families.images(40, 1)[0].permute(1, 2, 0).numpy(), 3, axis=2)
    seen = processor(images=image, return_tensors="pt")["pixel_values"]
    middle = torch.from_numpy(image[4:36, 4:36, :1]).permute(2, 0, 1)[None]
    torch.testing.assert_close(seen, families.pixels(middle), atol=1e-5, rtol=0)
    assert list(plain.config.id2label.values()) == manifest_of(folder).labels
    assert "has no report" in (folder / "README.md").read_text()


def test_folder_has_the_card_and_the_points_of_the_run(run: Path) -> None:
    folder = export(run, "hf", "--images", "3")
    card = (run / "report" / "MODEL_CARD.md").read_text()
    assert (folder / "README.md").read_text() == card
    points = run / "checkpoints" / "best" / "operating_points.json"
    assert (folder / "operating_points.json").read_bytes() == points.read_bytes()
    points.unlink()
    export(run, "hf", "--images", "3")
    assert not (folder / "operating_points.json").exists()


def test_folder_of_another_pooling_is_refused(tmp_path: Path) -> None:
    save_run("vit", tmp_path / "run", "model.pooling=mean", "data.root=/nowhere")
    with pytest.raises(ModelError, match=r"model\.pooling=mean.* --to onnx"):
        export(tmp_path / "run", "hf")
    assert not (tmp_path / "run" / "export-hf").exists()
    export(tmp_path / "run", "onnx")


@pytest.mark.parametrize(
    ("words", "error", "reason"),
    [
        (["{run}/other", "--to", "onnx"], CheckpointError, "no such folder"),
        (["{run}"], ConfigError, "--to"),
        (["{run}", "--to", "onnx", "--images", "0"], ConfigError, "one image or more"),
        (["{run}", "--to", "onnx", "--out", "{run}"], DataError, "--out"),
        (["{run}", "--to", "onnx", "--out", "{run}/config.yaml"], DataError, "cannot be written"),
        (["{run}", "--to", "onnx", "data.image_size=64"], CxrVitError, r"data\.image_size"),
    ],
)
def test_mistakes(run: Path, words: List[str], error: Any, reason: str) -> None:
    before = sorted(run.rglob("*"))
    with pytest.raises(error, match=reason):
        main(["export", *(word.format(run=run) for word in words)])
    assert sorted(run.rglob("*")) == before


def test_several_processes_are_refused(run: Path, monkeypatch: Any) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="Start the command without a launcher"):
        export(run, "onnx")
    assert not (run / "export-onnx").exists()


def test_export_of_another_kind_and_unknown_files_are_not_replaced(run: Path) -> None:
    folder = export(run, "onnx", "--images", "3")
    with pytest.raises(DataError, match="an export --to onnx"):
        export(run, "hf", "--out", folder)
    (folder / "manifest.json").write_text(json.dumps({"name": "my app", "icons": []}))
    with pytest.raises(DataError, match="not of an export"):
        export(run, "onnx")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="cut off"):
        export(run, "onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_missing_library_is_named(run: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineUnavailable, match=rf"{name} .*cxr-vit\[export\]"):
        export(run, "onnx")
    assert not (run / "export-onnx").exists()
