"""The ONNX graph computes what the checkpoint does, for every kind of model and any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from random_run import module_of_kind

import families
from cxr_vit.data.views import VIEWS
from cxr_vit.errors import ModelError
from cxr_vit.prediction import onnx_export
from cxr_vit.prediction.onnx_export import onnx_graph
from cxr_vit.prediction.parity import CheckpointScorer, largest_difference
from cxr_vit.training.scoring import mean_logits

onnxruntime = pytest.importorskip("onnxruntime")

IMAGES = families.images(40, 7)


@pytest.mark.parametrize("pooling", ["class", "mean", "both"])
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_graph_equals_the_module(kind: str, pooling: str, tmp_path: Path) -> None:
    module = module_of_kind(kind, tmp_path / "model", f"model.pooling={pooling}")
    session = onnxruntime.InferenceSession(onnx_graph(module).SerializeToString())
    for count in (1, 2, 7):
        images = IMAGES[:count]
        probabilities, logits = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = module(images[:, :, 4:36, 4:36])
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(probabilities, expected.sigmoid().numpy(), atol=1e-6)


def test_graph_averages_the_views_as_an_evaluation_does(tmp_path: Path) -> None:
    settings = ["evaluation.views=ten_crop", "model.image_mean=[0.4, 0.5, 0.7]"]
    module = module_of_kind("vit", tmp_path / "model", *settings)
    session = onnxruntime.InferenceSession(onnx_graph(module).SerializeToString())
    probabilities, logits = session.run(None, {"images": IMAGES.numpy()})
    scorer, images = CheckpointScorer(module), IMAGES[:, 0].numpy()
    with torch.no_grad():
        each = [module(scorer.pixels(images, view)) for view in VIEWS["ten_crop"]]
    assert (each[0] - each[4]).abs().max() > 0.01  # the views differ
    np.testing.assert_allclose(logits, mean_logits(each).numpy(), atol=1e-5)
    expected = torch.stack(each).sigmoid().mean(dim=0).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(scorer.probabilities(images), expected, atol=1e-6)


def test_weights_beyond_one_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of_kind("vit", tmp_path / "model")
    monkeypatch.setattr(onnx_export, "LARGEST_ONNX", onnx_export._GRAPH_BYTES + 1000)
    with pytest.raises(ModelError, match="--to hf"):
        onnx_graph(module)


@pytest.mark.parametrize("other", [1.0 + 1e-3, float("nan")])
def test_difference_beyond_the_limit_is_refused(other: float) -> None:
    images = [np.zeros((2, 4, 4), np.uint8)]
    with pytest.raises(ModelError, match="differs from the checkpoint"):
        largest_difference(lambda _: np.ones(3), lambda _: np.array([1.0, other, 1.0]), images)
