import numpy as np
import pytest
import torch
from torch import nn

from cxr_vit.config.schema import OptimSection
from cxr_vit.data.labels import FINDINGS
from cxr_vit.engines.optim import build_optimizer, check_kind, parameter_groups
from cxr_vit.errors import CheckpointError
from cxr_vit.model.stages import StagedViT


@pytest.fixture
def model(make_config):
    return StagedViT.from_config(make_config(), names=FINDINGS, prevalence=np.full(14, 0.1))


def names_of(model, group):
    wanted = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.hub_parameters() if id(parameter) in wanted}


def test_biases_norms_class_token_and_positions_are_not_decayed(model):
    decayed, kept = parameter_groups(model.hub_parameters(), OptimSection(weight_decay=0.1))
    kept_names = names_of(model, kept)
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= kept_names
    assert "vit.layernorm.weight" in kept_names
    assert all(
        name.endswith(("bias", "_token", "_embeddings")) or "norm" in name for name in kept_names
    )
    assert names_of(model, decayed) == {
        name for name, _ in model.hub_parameters() if name.endswith("weight") and "norm" not in name
    }
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_decay_all_decays_all_parameters(model):
    (group,) = parameter_groups(
        model.hub_parameters(), OptimSection(weight_decay=0.1, decay_all=True)
    )
    assert len(group["params"]) == len(list(model.parameters()))
    assert group["weight_decay"] == 0.1


def test_weight_decay_shrinks_only_decayed_parameters():
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(
        [("a.weight", weight), ("a.bias", bias)], OptimSection(lr=0.1, weight_decay=0.5)
    )
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), 0.95))
    assert torch.equal(bias, torch.ones(2))


def test_settings_are_passed_to_the_optimizer():
    optim = OptimSection(lr=0.3, beta1=0.8, beta2=0.95, eps=1e-6)
    optimizer = build_optimizer([("a.weight", nn.Parameter(torch.ones(2, 2)))], optim)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.95), 1e-6)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("torch.AdamW", "torch.AdamW"),
        ("torch.AdamW", "poptorch.AdamW"),
        ("poptorch.AdamW", "torch.AdamW"),
        ("poptorch.LAMB", "poptorch.LAMB"),
        ("", "torch.SGD"),
    ],
)
def test_state_of_the_same_meaning_is_accepted(given, own):
    check_kind(given, own)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("torch.SGD", "poptorch.SGD"),  # PopART's velocity is scaled with the loss
        ("poptorch.LAMB", "torch.AdamW"),
        ("torch.AdamW", "torch.SGD"),
        ("poptorch.AdamW", "poptorch.LAMB"),
    ],
)
def test_state_of_another_meaning_is_refused_with_advice(given, own):
    with pytest.raises(CheckpointError, match=r"train\.resume_weights_only=true") as caught:
        check_kind(given, own)
    assert given in str(caught.value)
    assert own in str(caught.value)
