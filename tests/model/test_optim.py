import pytest
import torch
from torch import nn

from conftest import module_of
from cxr_vit.config.schema import OptimSection
from cxr_vit.errors import ConfigError
from cxr_vit.model.optim import (
    build_optimizer,
    freeze_others,
    learning_rate_ratios,
    parameter_groups,
)


@pytest.fixture
def model(make_config):
    return module_of(make_config()).model


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
    optim = OptimSection(lr=0.1, weight_decay=0.5)
    groups = parameter_groups([("a.weight", weight), ("a.bias", bias)], optim)
    optimizer = build_optimizer(groups, optim, lr=0.1)
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), 0.95))
    assert torch.equal(bias, torch.ones(2))


def test_settings_are_passed_to_the_optimizer():
    optim = OptimSection(beta1=0.8, beta2=0.95, eps=1e-6)
    groups = parameter_groups([("a.weight", nn.Parameter(torch.ones(2, 2)))], optim)
    optimizer = build_optimizer(groups, optim, lr=0.3)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.95), 1e-6)


def test_optimizer_of_poptorch_is_refused_with_advice():
    with pytest.raises(ConfigError, match=r"torch has adamw and sgd.*engine\.name=poptorch"):
        build_optimizer([], OptimSection(name="lamb"), lr=0.1)


def test_ratios_are_those_of_the_groups_own_rates():
    groups = [
        {"params": [nn.Parameter(torch.ones(1))]},
        {"params": [nn.Parameter(torch.ones(1))], "lr": 0.02},
    ]
    optimizer = build_optimizer(groups, OptimSection(), lr=0.2)
    assert learning_rate_ratios(optimizer, nn.Linear(1, 1), 0.2) == [1.0, pytest.approx(0.1)]


def test_parameters_in_no_group_are_frozen(model):
    head = [parameter for name, parameter in model.hub_parameters() if "classifier" in name]
    freeze_others(model, torch.optim.SGD(head, lr=0.1))
    trained = [name for name, parameter in model.hub_parameters() if parameter.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]


def test_process_whose_stages_are_frozen_has_an_optimizer_without_parameters():
    for name in ("adamw", "sgd"):
        optimizer = build_optimizer([], OptimSection(name=name), lr=0.1)
        assert [group["params"] for group in optimizer.param_groups] == [[]]
        optimizer.step()
        assert learning_rate_ratios(optimizer, nn.Linear(1, 1), 0.1) == [1]


def test_stage_with_a_rate_of_its_own_is_no_whole_model(make_config):
    """In the pipeline engine a process has the groups of its own stages only."""
    model = module_of(make_config()).model.keep([1])
    weights = [weight for weight in model.parameters() if not weight.is_meta]
    optimizer = torch.optim.SGD([{"params": weights, "lr": 0.5}], lr=1.0)
    assert learning_rate_ratios(optimizer, model, 1.0) == [0.5]
    with pytest.raises(ConfigError, match=r"lr=0\.5 for all parameters"):
        learning_rate_ratios(optimizer, module_of(make_config()).model, 1.0)
