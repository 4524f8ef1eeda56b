"""What the head takes: the class token, the mean of the patches with its norm, or both."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from cxr_vit.config.architectures import KINDS
from cxr_vit.config.plans import StagePlan
from cxr_vit.config.schema import ModelSection
from cxr_vit.data.labels import FINDINGS
from cxr_vit.errors import CheckpointError, ModelError
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import VitParts, build_vit, layer_output
from families import FAMILIES, images, pixels, save

EVERY = [(kind, pooling) for kind in sorted(FAMILIES) for pooling in ("class", "mean", "both")]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "weights.md"


def build(name, layers=(1, 1), names=FINDINGS, **settings):
    """Build a model in stages."""
    model = build_vit(
        ModelSection(name=str(name), **settings),
        names=names,
        image_size=32,
        layers_per_stage=layers,
        seed=0,
    )
    return StagedViT(model, StagePlan.from_list(layers), mean=0.5, std=0.5).eval()


def stirred(model):
    """Move the norm and the head of a model away from their initial values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in (VitParts(model._undivided[0]).norm[1], head_of(model)):
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model


def head_of(model):
    return model._undivided[0].classifier


def write(model, folder):
    """Write a model as a checkpoint does."""
    folder.mkdir(exist_ok=True)
    save_file(model.weights(), str(folder / "model.safetensors"), {"format": "pt"})
    for name, text in model.hub_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("kind", "pooling"), EVERY)
def test_logits_are_those_of_the_pooled_tokens_and_survive_a_checkpoint(kind, pooling, tmp_path):
    original = save(kind, tmp_path / "trunk", head=False)
    model = stirred(build(tmp_path / "trunk", pooling=pooling))
    with torch.no_grad():
        tokens = original.embeddings(pixels(images(32)))
        layers = original.encoder.layer if hasattr(original, "encoder") else original.layers
        for layer in layers:
            tokens = layer_output(layer(tokens))
        norm, head = VitParts(model._undivided[0]).norm[1], head_of(model)
        extra = 2 if kind == "deit" else 1
        normed = norm(tokens)
        pooled = {
            "class": normed[:, 0],
            "mean": norm(tokens[:, extra:].mean(dim=1)),
            "both": torch.cat([normed[:, 0], normed[:, extra:].mean(dim=1)], dim=1),
        }
        logits = model(images(32))
        assert torch.allclose(logits, head(pooled[pooling]), rtol=0, atol=1e-5)
        again = build(write(model, tmp_path / "saved"), layers=(2,))(images(32))
    assert torch.equal(logits, again), "model.pooling=null is that of the checkpoint"
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved.get("pooling", KINDS[kind].pooling) == pooling
    model(images(32)).sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_mean_has_a_norm_of_its_own_in_place_of_the_trunks(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="cxr_vit")
    save("vit", tmp_path, layer_norm_eps=1e-5)
    model = build(tmp_path, pooling="mean")
    assert "left out vit.layernorm.bias, vit.layernorm.weight (pooling: mean)" in caplog.text
    assert "has another pooling (class): its head is replaced" in caplog.text
    name, norm = VitParts(model._undivided[0]).norm
    assert (name, norm.eps) == ("fc_norm", 1e-5)
    assert torch.equal(norm.weight, torch.ones(24))
    assert torch.equal(norm.bias, torch.zeros(24))
    assert not [key for key in model.weights() if "layernorm." in key]
    write(model, tmp_path / "mean")
    caplog.clear()
    back = build(tmp_path / "mean", pooling="class")
    assert "left out fc_norm.bias, fc_norm.weight (pooling: class)" in caplog.text
    assert torch.equal(back.weights()["vit.layernorm.weight"], torch.ones(24))


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_weights_with_a_norm_of_the_mean_are_loaded_with_it(tmp_path, pooling):
    """As those that timm and MAE save after a fine-tuning."""
    original = save("vit", tmp_path)
    weights = load_file(str(tmp_path / "model.safetensors"))
    for end in ("weight", "bias"):
        weights[f"fc_norm.{end}"] = weights.pop(f"vit.layernorm.{end}")
    save_file(weights, str(tmp_path / "model.safetensors"), {"format": "pt"})
    found = build(tmp_path, pooling=pooling).weights()
    assert torch.equal(found["fc_norm.weight"], original.vit.layernorm.weight)
    assert torch.equal(found["classifier.weight"], original.classifier.weight)


def test_norm_of_the_weights_own_pooling_may_not_be_missing(tmp_path):
    write(build("vit-micro", (4,), patch_size=8, pooling="mean"), tmp_path)
    weights = load_file(str(tmp_path / "model.safetensors"))
    del weights["fc_norm.bias"]
    save_file(weights, str(tmp_path / "model.safetensors"), {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing: fc_norm\.bias"):
        build(tmp_path, (4,))


def test_weights_of_another_pooling_are_not_taken_into_a_model(tmp_path):
    models = [build("vit-micro", (4,), patch_size=8, pooling=word) for word in ("mean", "class")]
    with pytest.raises(CheckpointError, match=r"missing fc_norm.*unexpected vit\.layernorm"):
        models[0].load_weights(models[1].weights())


@pytest.mark.parametrize("word", ["cls", 3])
def test_unknown_pooling_of_a_config_is_refused(tmp_path, word):
    save("vit", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pooling": word}))
    with pytest.raises(ModelError, match=r"pooling="):
        build(tmp_path)


# The scale of the head


@pytest.mark.parametrize("pooling", [None, "both"])
def test_head_std_is_that_of_a_new_head_only(tmp_path, pooling):
    sizes = {"patch_size": 8, "pooling": pooling}
    plain, small = (build("vit-micro", (4,), head_std=std, **sizes) for std in (None, 2e-5))
    assert head_of(plain).weight.std().item() == pytest.approx(0.05, rel=0.1)  # of vit-micro
    assert head_of(small).weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert torch.count_nonzero(head_of(small).bias) == 0
    folder = write(plain, tmp_path)
    kept = build(folder, (4,), head_std=2e-5)
    assert torch.equal(head_of(kept).weight, head_of(plain).weight)
    new = build(folder, (4,), head_std=2e-5, names=["Mass", "Nodule"])
    assert head_of(new).weight.std().item() == pytest.approx(2e-5, rel=0.2)


# Plain transformers


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()


@pytest.fixture
def transformers_says():
    """Return a function that loads a folder with transformers; with what it warns of."""
    logger, handler = logging.getLogger("transformers"), Messages()
    before = transformers.logging.get_verbosity()

    def load(kind, folder):
        transformers.logging.set_verbosity_warning()
        return FAMILIES[kind][2].from_pretrained(str(folder)).eval(), handler

    logger.addHandler(handler)
    yield load
    logger.removeHandler(handler)
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("vit", "both"), ("deit", "both"), ("dinov2", "class"), ("dinov2", "mean")],
)
def test_transformers_refuses_a_head_of_another_width(kind, pooling, tmp_path, transformers_says):
    save(kind, tmp_path / "trunk", head=False)
    write(build(tmp_path / "trunk", pooling=pooling), tmp_path / "saved")
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers_says(kind, tmp_path / "saved")


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_transformers_warns_of_the_norm_and_the_docs_compute_the_logits(
    kind, tmp_path, transformers_says
):
    save(kind, tmp_path / "trunk", head=False)
    model = stirred(build(tmp_path / "trunk", pooling="mean"))
    folder = write(model, tmp_path / "saved")
    wrong, said = transformers_says(kind, folder)
    assert f"{kind}.layernorm.weight" in said.text.replace("{weight, bias}", "weight")
    assert "fc_norm" in said.text
    (block,) = [text for text in DOCS.read_text().split("```python\n")[1:] if "fc_norm" in text]
    names = {}
    exec(block.split("```")[0], names)
    with torch.no_grad():
        expected = model(images(32))
        logits = names["logits_of"](str(folder), pixels(images(32)))
        plain = wrong(pixels(images(32))).logits
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=0, atol=1e-2)


def test_pool_of_fp16_tokens_does_not_overflow(tmp_path):
    """The sum over the patches is beyond the range of fp16."""
    model = build("vit-micro", (4,), patch_size=8, pooling="mean")
    pool = VitParts(model._undivided[0]).pool
    tokens = torch.full((1, 17, 96), 6e4, dtype=torch.float16)
    pooled = pool(tokens, nn.Identity())
    assert pooled.dtype == torch.float16
    assert torch.equal(pooled, tokens[:, 0])
