"""Recomputation in torch: the same numbers, and less that is held for the backward pass."""

import pytest
import torch

from conftest import engine_of, module_of
from cxr_vit.config.plans import StagePlan
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.errors import ModelError
from cxr_vit.model.drop_path import DropPath
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import VitParts, layer_halves, layer_output, take_factors
from families import FAMILIES, images, make
from plain_loop import host_batches

#: From the most that is held to the least.
WORDS = ("none", "attention_mlp", "every_layer", "stage_inputs")


def one_pass(kind, recompute, *, dtype=torch.float32, cut=(2, 2)):
    """Return the logits, the gradients, and the bytes held for the backward pass."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    hub = make(kind, num_hidden_layers=4, **dropout)
    plan = StagePlan.from_list(cut)
    model = StagedViT(hub, plan, mean=0.5, std=0.5).train()
    model.recompute(plan.kept_outputs(recompute, on_ipus=False))
    weights = {weight.data_ptr() for weight in model.parameters()}
    held = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    paths = DropPath(0.5, 4, seed=0).factors(0, torch.arange(6), 6)
    torch.manual_seed(0)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    # The hooks see what stays: recomputed tensors are packed by hooks of their own.
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images(32, 6), paths)
    logits.float().square().sum().backward()
    gradients = [weight.grad for name, weight in model.named_parameters() if "mask" not in name]
    assert all(gradient is not None for gradient in gradients)
    return logits, gradients, sum(held.values())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("vit", torch.float32), ("vit", torch.bfloat16), ("dinov2", torch.float32)],
)
def test_logits_and_gradients_are_the_same_and_less_is_held(kind, dtype):
    logits, gradients, most = one_pass(kind, "none", dtype=dtype)
    held = [most]
    for word in WORDS[1:]:
        again, others, bytes_held = one_pass(kind, word, dtype=dtype)
        assert torch.equal(again, logits)
        assert all(torch.equal(one, other) for one, other in zip(gradients, others)), word
        held.append(bytes_held)
    assert held == sorted(held, reverse=True), "in the order of WORDS"
    assert held[2] < held[0] / 4


@pytest.mark.parametrize("recompute", [["every_layer", []], ["attention_mlp", [2]], [[1], [3]]])
def test_stages_may_keep_different_outputs(recompute):
    logits, gradients, _ = one_pass("vit", "none")
    again, others, _ = one_pass("vit", recompute)
    assert torch.equal(again, logits)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others))


def test_embedding_or_head_alone_on_a_stage():
    logits, gradients, most = one_pass("vit", "none", cut=(0, 4, 0))
    again, others, less = one_pass("vit", "every_layer", cut=(0, 4, 0))
    assert torch.equal(again, logits) and less < most / 4
    assert all(torch.equal(one, other) for one, other in zip(gradients, others))


@pytest.mark.parametrize("kind", FAMILIES)
def test_two_halves_are_a_layer(kind):
    _, layer = VitParts(make(kind, hidden_dropout_prob=0.1)).layers[0]
    attention, mlp = layer_halves(layer.train())
    hidden = torch.randn(2, 17, 24)
    torch.manual_seed(0)
    expected = layer_output(layer(hidden))
    torch.manual_seed(0)
    assert torch.equal(mlp(attention(hidden)), expected)


def test_the_end_of_a_layer_may_be_of_the_user_and_is_refused_only_with_factors():
    _, layer = VitParts(make("vit")).layers[0]
    end = getattr(layer, "output", None)
    if end is None:
        pytest.skip("this transformers has no such part")

    class Adapter(type(end)):
        def forward(self, hidden, value):
            return super().forward(hidden, value) + 1

    end.__class__ = Adapter
    attention, mlp = layer_halves(layer)
    hidden = torch.randn(2, 17, 24)
    assert torch.equal(mlp(attention(hidden)), layer_output(layer(hidden)))
    with pytest.raises(ModelError, match=r"^Adapter, in an encoder layer, .*model\.drop_path=0"):
        take_factors(layer)(hidden, factors=torch.ones(2, 2))


def test_training_gives_the_same_losses_and_weights(make_config):
    shared = ("model.dropout=0.1", "model.drop_path=0.3", "engine.precision=bf16")
    results = []
    for recompute in ("null", "[stage_inputs, attention_mlp, [], every_layer]"):
        config = make_config(*shared, f"pipeline.recompute={recompute}", "train.steps=2")
        data = ChestXrayDataModule(config)
        with engine_of(config, module_of(config, data)) as engine:
            kept = engine.module.model.plan.kept_outputs(config.pipeline.recompute, on_ipus=False)
            assert (kept is None) == (recompute == "null")
            assert [stage.kept for stage in engine.model._stages] == (kept or [None] * 4)
            batches = engine.loader(
                data.dataset("train"), host_batches(config, data), training=True
            )
            losses = torch.cat([engine.train_step(batch, lr=1e-3).losses for batch in batches])
            results.append((losses, engine.state_dict().weights))
    (losses, weights), (others, other_weights) = results
    assert len(losses) == 2 and torch.equal(losses, others)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
