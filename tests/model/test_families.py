"""ViT, DeiT and DINOv2 in stages compute what transformers computes from the same folder."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.config.plans import StagePlan
from cxr_vit.config.schema import Config, ModelSection, OptimSection
from cxr_vit.data.images import read_gray
from cxr_vit.data.labels import FINDINGS
from cxr_vit.errors import ModelError
from cxr_vit.model.optim import parameter_groups
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import VitParts, build_vit
from families import FAMILIES, images, make, outputs, save

KINDS = sorted(FAMILIES)
NEAR = {"rtol": 0, "atol": 1e-5}


def load(folder, image_size=32, layers=(1, 1)):
    """Build the model of a folder, in stages."""
    model = build_vit(
        ModelSection(name=str(folder)),
        names=FINDINGS,
        image_size=image_size,
        layers_per_stage=layers,
        seed=0,
    )
    return StagedViT(model, StagePlan.from_list(layers), mean=0.5, std=0.5).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [[2], [1, 1], [0, 2, 0]])
def test_logits_are_those_of_transformers(kind, layers, tmp_path):
    original = save(kind, tmp_path)
    with torch.no_grad():
        logits = load(tmp_path, layers=layers)(images(32))
    assert torch.allclose(logits, outputs(original, images(32)).logits, **NEAR)


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_gets_a_new_head_on_the_features_of_transformers(kind, tmp_path):
    original = save(kind, tmp_path, head=False)
    model = load(tmp_path)
    seen = []
    norm, head = (getattr(VitParts(model._undivided[0]), part)[1] for part in ("norm", "head"))
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(images(32))
    expected = outputs(original, images(32)).last_hidden_state
    assert torch.allclose(seen[0], expected, **NEAR)
    assert head.weight.shape == (14, 48 if kind == "dinov2" else 24)
    assert torch.count_nonzero(head.bias) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 56])
def test_positions_are_interpolated_for_another_image_size(kind, size, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="cxr_vit")
    original = save(kind, tmp_path)
    model = load(tmp_path, image_size=size)
    with torch.no_grad():
        assert torch.allclose(model(images(size)), outputs(original, images(size)).logits, **NEAR)
    assert f"interpolated from 4 x 4 to {size // 8} x {size // 8} patches" in caplog.text
    assert model.config.image_size == size
    assert model.hidden_shape == ((size // 8) ** 2 + (2 if kind == "deit" else 1), 24)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_the_same_grid_are_not_touched(kind, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="cxr_vit")
    original = save(kind, tmp_path)
    weights = load(tmp_path).weights()
    saved = original.state_dict()[f"{kind}.embeddings.position_embeddings"]
    assert torch.equal(weights[f"{kind}.embeddings.position_embeddings"], saved)
    assert "interpolated" not in caplog.text


def test_rectangular_grid_is_interpolated_by_rows_and_columns(tmp_path):
    original = save("deit", tmp_path, image_size=[16, 32])
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == [16, 32]
    found = load(tmp_path, image_size=24).weights()["deit.embeddings.position_embeddings"]
    saved = original.deit.embeddings.position_embeddings.detach()
    plane = saved[:, 2:].view(1, 2, 4, 24).permute(0, 3, 1, 2)
    resized = F.interpolate(plane, size=(3, 3), mode="bicubic", align_corners=False)
    assert torch.equal(found[:, :2], saved[:, :2]), "of the class and the distillation token"
    assert torch.allclose(found[:, 2:], resized.permute(0, 2, 3, 1).reshape(1, 9, 24), atol=1e-6)


def test_half_precision_positions_are_interpolated_in_fp32(tmp_path):
    original = make("vit").half()
    original.save_pretrained(str(tmp_path))
    found = load(tmp_path, image_size=16)
    with torch.no_grad():
        expected = outputs(original.float(), images(16)).logits
        assert torch.allclose(found(images(16)), expected, **NEAR)


def test_positions_that_are_not_those_of_the_config_are_refused(tmp_path):
    save("dinov2", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_size": 64}))
    with pytest.raises(ModelError, match=r"of another shape: dinov2.*position_embeddings"):
        load(tmp_path, image_size=48)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind, tmp_path):
    """A parameter without one ends distributed training."""
    save(kind, tmp_path)
    model = load(tmp_path)
    model(images(32)).sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert not [name for name, _ in model.named_parameters() if "mask_token" in name]


@pytest.mark.filterwarnings("ignore::Warning")  # of the tracer, and of its deprecation
def test_no_traced_graph_interpolates(tmp_path):
    """DINOv2's embeddings of transformers do so in every traced forward pass."""
    save("dinov2", tmp_path)
    with torch.no_grad():
        traced = torch.jit.trace(load(tmp_path), images(32), check_trace=False)
    graph = str(traced.inlined_graph)
    assert "aten::layer_norm" in graph
    assert "upsample" not in graph


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_scales_and_positions_are_not_decayed(kind, tmp_path):
    save(kind, tmp_path)
    model = load(tmp_path)
    decayed, _ = parameter_groups(
        model.hub_parameters(), Config(optim=OptimSection(weight_decay=0.1)), depth=4
    )
    found = {id(weight) for weight in decayed["params"]}
    names = {name for name, weight in model.hub_parameters() if id(weight) in found}
    assert len(names) == 2 * 6 + 2, "six matrices a layer, patches, head"
    assert all(name.endswith(".weight") and "norm" not in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_run_is_saved_resumed_scored_and_started_from(kind, make_config, tmp_path):
    save(kind, tmp_path / "start")
    shared = ("pipeline.layers_per_stage=[1, 1]", "train.eval_every_steps=9", "train.keep_last=9")
    config = make_config(
        *shared, f"model.name={tmp_path / 'start'}", f"run.dir={tmp_path / 'run'}",
        "data.image_size=48", "train.steps=2", "train.checkpoint_every_steps=1",
    )  # fmt: skip
    data = ChestXrayDataModule(config)
    trainer = Trainer(config, loggers=[])
    trainer.fit(ViTModule(config, data), data)
    last = trainer.run.path / "checkpoints" / "last"
    sample = next(iter(data.test_dataloader())).images

    plain = FAMILIES[kind][2].from_pretrained(str(last)).float().eval()
    assert plain.config.image_size == 48
    module = ViTModule.load_from_checkpoint(trainer.run.path / "checkpoints" / "step_00000002")
    module.setup()
    module.model.eval()
    with torch.no_grad():
        logits = module(sample)
    assert torch.allclose(logits, outputs(plain, sample).logits, **NEAR)
    file = sorted(Path(config.data.root).rglob("*.png"))[0]
    image = torch.from_numpy(read_gray(file, 48))[None, None]
    expected = outputs(plain, image).logits.sigmoid()
    assert torch.allclose(trainer.predict(module, [file]), expected, **NEAR)

    cut = tmp_path / "cut"
    shutil.copytree(str(trainer.run.path), str(cut), symlinks=True)
    shutil.rmtree(str(cut / "checkpoints" / "step_00000002"))
    resumed = config.changed(run={"dir": str(cut)})
    Trainer(resumed, loggers=[]).fit(ViTModule(resumed, data), data, ckpt_path=cut)
    once, again = (
        load_file(str(path / "checkpoints/last/model.safetensors"))
        for path in (trainer.run.path, cut)
    )
    assert all(torch.equal(once[name], again[name]) for name in once)

    changed = make_config(
        *shared, f"model.name={last.resolve()}", "data.image_size=16", "train.steps=1",
        f"run.dir={tmp_path / 'next'}",
    )  # fmt: skip
    started = ViTModule(changed)
    started.setup()
    started.model.eval()
    with torch.no_grad():
        small = started(images(16))
    assert torch.allclose(small, outputs(plain, images(16)).logits, **NEAR)
    with pytest.raises(ModelError, match=r"takes images of 48 pixels.*Set data\.image_size=48"):
        ViTModule(changed, checkpoint=last)
