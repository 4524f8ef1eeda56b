"""Checkpoints written by transformers 4.46 and 5.x, read by the installed version."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DeiTForImageClassification,
    Dinov2ForImageClassification,
    ViTForImageClassification,
)

from cxr_vit.config.plans import StagePlan
from cxr_vit.config.schema import ModelSection
from cxr_vit.data.labels import FINDINGS
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import build_vit
from cxr_vit.training.checkpoint import load_checkpoint

CLASSIFIERS = {
    "vit": ViTForImageClassification,
    "deit": DeiTForImageClassification,
    "dinov2": Dinov2ForImageClassification,
}


@pytest.fixture(params=["4", "5", "4_deit", "5_deit", "4_dinov2", "5_dinov2"])
def written(request, repository):
    """A checkpoint folder of one version, with the images and logits saved beside it."""
    folder = repository / "tests" / "fixtures" / f"transformers_{request.param}"
    return folder / "checkpoint", load_file(str(folder / "expected.safetensors"))


def depth_of(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]


def test_plain_transformers_computes_the_same_logits(written):
    checkpoint, expected = written
    kind = json.loads((checkpoint / "config.json").read_text())["model_type"]
    model = CLASSIFIERS[kind].from_pretrained(checkpoint).float().eval()
    pixels = ((expected["images"].float() / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1)
    with torch.no_grad():
        logits = model(pixels).logits
    assert torch.allclose(logits, expected["logits"], atol=1e-6)
    assert model.config.id2label[13] == "Hernia"
    assert model.config.problem_type == "multi_label_classification"


def test_evaluation_computes_the_same_logits(written):
    checkpoint, expected = written
    vit = build_vit(
        ModelSection(name=str(checkpoint)),
        names=FINDINGS,
        image_size=16,
        layers_per_stage=[1, depth_of(checkpoint) - 1],
        seed=0,
    )
    plan = StagePlan((1, depth_of(checkpoint) - 1))
    model = StagedViT(vit, plan, mean=0.5, std=0.5).eval()
    with torch.no_grad():
        assert torch.allclose(model(expected["images"]), expected["logits"], atol=1e-6)


def test_resume_loads_the_weights(written):
    checkpoint, expected = written
    state, _ = load_checkpoint(checkpoint)
    vit = build_vit(
        ModelSection(name=str(checkpoint)),
        names=FINDINGS,
        image_size=16,
        layers_per_stage=[depth_of(checkpoint)],
        seed=0,
    )
    torch.nn.init.normal_(vit.classifier.weight)
    model = StagedViT(vit, StagePlan((depth_of(checkpoint),)), mean=0.5, std=0.5).eval()
    model.load_weights(state.weights)
    with torch.no_grad():
        assert torch.allclose(model(expected["images"]), expected["logits"], atol=1e-6)
