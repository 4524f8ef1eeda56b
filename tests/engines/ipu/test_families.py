"""DeiT and DINOv2 on IPUs, in stages, compared with the torch engine."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cxr_vit.data.dataset import Batch
from families import save

from .commands import IPU, compiled, make_engine

#: Two stages of a layer each, and numbers of one's own per channel.
SHARED = (
    "pipeline.layers_per_stage=[1, 1]",
    "batch.gradient_accumulation=3",
    "model.hidden_act=gelu_pytorch_tanh",
    "model.image_mean=[0.485, 0.456, 0.406]",
    "model.image_std=[0.229, 0.224, 0.225]",
    "data.image_size=48",
    "train.steps=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a random model of a kind."""
    root = tmp_path_factory.mktemp("models")

    def find(kind):
        if not (root / kind).exists():
            save(kind, root / kind)
        return root / kind

    return find


def near(expected):
    return pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("dinov2", "pipeline.recompute=attention_mlp"),
        ("deit", "pipeline.eval_layers_per_stage=[2]"),
    ],
)
def test_losses_and_logits_are_those_of_the_torch_engine(
    ipu, commands, torch_run, folder, kind, setting
):
    shared = (*SHARED, f"model.name={folder(kind)}")
    run, expected = commands.train(*shared, setting, *IPU), torch_run(*shared)
    assert run.status == expected.status == 0
    assert len(set(run.losses)) == 2
    assert run.losses == near(expected.losses)
    assert run.logits[0].tolist() == [near(row) for row in expected.logits[0].tolist()]


@pytest.mark.parametrize("pooling", ["both", "mean"])
def test_fp16_with_fp32_scales_promotes_nothing(ipu, commands, folder, pooling):
    """A LayerScale in fp32 would make the hidden states of all later layers fp32."""
    _, inspection = ipu
    shared = (*SHARED, f"model.name={folder('dinov2')}", "pipeline.recompute=attention_mlp")
    shared = (*shared, f"model.pooling={pooling}")
    config = commands.config(*shared, "engine.precision=fp16", "engine.weights=fp32", *IPU)
    seen = Counter()

    def record(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen[hidden.dtype] += 1

    with make_engine(config) as engine:
        for layer in engine.model.layers:
            for module in layer.modules():
                module.register_forward_hook(record)
        size = engine.local_batch.host_batch_size
        output = engine.train_step(Batch.zeros(size, image_size=48, num_classes=14), lr=1e-4)
        assert torch.isfinite(output.losses).all()
    for executable in compiled(inspection):
        if hasattr(inspection, "unhandled_ops"):  # of PopTorch's compiler, by its front end
            assert inspection.unhandled_ops(executable) == {}
        assert not [name for name, _, _ in executable.ops if "upsample" in name]
    assert set(seen) == {torch.float16}, seen
