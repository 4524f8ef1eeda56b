import pytest
import torch
from torch import nn

from conftest import module_of
from cxr_vit.config.schema import Config, ModelSection, OptimSection
from cxr_vit.errors import ConfigError
from cxr_vit.model.optim import (
    _has_fused_on_cpus,
    build_optimizer,
    freeze_others,
    learning_rate_ratios,
    parameter_groups,
    rate_scale,
)


@pytest.fixture
def model(make_config):
    return module_of(make_config()).model


def groups_of(parameters, *, depth=4, freeze="none", **optim):
    config = Config(optim=OptimSection(**optim), model=ModelSection(freeze=freeze))
    return parameter_groups(parameters, config, depth=depth)


def names_of(model, group):
    wanted = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.hub_parameters() if id(parameter) in wanted}


def test_biases_norms_class_token_and_positions_are_not_decayed(model):
    decayed, kept = groups_of(model.hub_parameters(), weight_decay=0.1)
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
    (group,) = groups_of(model.hub_parameters(), weight_decay=0.1, decay_all=True)
    assert len(group["params"]) == len(list(model.parameters()))
    assert group["weight_decay"] == 0.1


def test_weight_decay_shrinks_only_decayed_parameters():
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = groups_of([("a.weight", weight), ("a.bias", bias)], lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(groups, OptimSection(), lr=0.1)
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), 0.95))
    assert torch.equal(bias, torch.ones(2))


def test_settings_are_passed_to_the_optimizer():
    optim = OptimSection(beta1=0.8, beta2=0.95, eps=1e-6)
    groups = groups_of([("a.weight", nn.Parameter(torch.ones(2, 2)))])
    optimizer = build_optimizer(groups, optim, lr=0.3)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.95), 1e-6)


def test_adamw_is_fused_where_torch_can():
    """The kernel for CPUs would pair the elements of these weights and moments wrongly."""
    has_fused = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)
    assert _has_fused_on_cpus() == has_fused
    for weight, is_fused in [
        (torch.ones(2, 3), has_fused),
        (torch.ones(2, 3, dtype=torch.bfloat16), has_fused),
        (torch.ones(3, 2).t(), False),
    ]:
        groups = groups_of([("a.weight", nn.Parameter(weight))])
        (group,) = build_optimizer(groups, OptimSection(), lr=0.1).param_groups
        assert bool(group["fused"]) == is_fused


def test_optimizer_of_poptorch_is_refused_with_advice():
    with pytest.raises(ConfigError, match=r"torch has adamw and sgd.*engine\.name=poptorch"):
        build_optimizer([], OptimSection(name="lamb"), lr=0.1)


def test_ratios_are_those_of_the_groups_own_rates():
    groups = [
        {"params": [nn.Parameter(torch.ones(1))]},
        {"params": [nn.Parameter(torch.ones(1))], "lr": 0.02},
    ]
    optimizer = build_optimizer(groups, OptimSection(), lr=0.2)
    assert learning_rate_ratios(optimizer, 0.2) == [1.0, pytest.approx(0.1)]


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
        assert learning_rate_ratios(optimizer, 0.1) == [1]


def test_groups_with_rates_of_their_own_are_not_refused():
    """A probe has one group, with the head's rate; a stage of the pipeline engine, its own."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.5}], lr=1.0)
    assert learning_rate_ratios(optimizer, 1.0) == [0.5]
    with pytest.raises(ConfigError, match=r"passes lr=0\.5 to SGD, and 1 is what the schedule"):
        learning_rate_ratios(torch.optim.SGD([weight], lr=0.5), 1.0)


# Layer decay, the rate of the head, and freezing


def scales(names, depth, **optim):
    return [rate_scale(name, OptimSection(**optim), depth) for name in names]


def names_at(depth, kind="vit"):
    """One parameter of each layer id: 0, the layers, depth + 1."""
    layers = [f"{kind}.encoder.layer.{i}.output.dense.weight" for i in range(depth)]
    return [f"{kind}.embeddings.cls_token", *layers, f"{kind}.layernorm.weight"]


def test_layer_decay_of_the_mae_fine_tuning_at_every_layer():
    """0.65 to the powers 13 (embeddings) to 0 (final norm and head), computed by hand."""
    expected = [
        0.0036972058910,
        0.0056880090631, 0.0087507831740, 0.0134627433446, 0.0207119128379, 0.0318644812890,
        0.0490222789063, 0.0754188906250, 0.1160290625000, 0.1785062500000, 0.2746250000000,
        0.4225000000000, 0.6500000000000,
        1.0,
    ]  # fmt: skip
    for kind in ("vit", "deit", "dinov2"):
        assert scales(names_at(12, kind), 12, layer_decay=0.65) == pytest.approx(expected, rel=1e-9)
    rest = ["classifier.weight", "classifier.0.bias", "fc_norm.weight", "vit.layernorm.bias"]
    assert scales(rest, 12, layer_decay=0.65) == [1, 1, 1, 1]


def test_layer_decay_of_four_layers_and_the_rate_of_the_head():
    """0.5 and 0.55 to the powers 5 to 0, exact and rounded."""
    names = [*names_at(4), "classifier.weight", "fc_norm.bias"]
    powers = [0.03125, 0.0625, 0.125, 0.25, 0.5, 1]
    assert scales(names, 4, layer_decay=0.5, head_lr_scale=10) == [*powers, 10, 10]
    rounded = [0.0503284375, 0.09150625, 0.166375, 0.3025, 0.55, 1]
    assert scales(names, 4, layer_decay=0.55) == pytest.approx([*rounded, 1, 1], rel=1e-12)
    assert scales(names, 4, head_lr_scale=0.1) == [1, 1, 1, 1, 1, 1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("vit.embeddings.patch_embeddings.projection.bias", 0.125),
        ("vit.encoder.layer.1.attention.attention.query.weight", 0.5),
        ("dinov2.encoder.layer.0.layer_scale1.lambda1", 0.25),
        ("classifier.encoder.layer.0.weight", 1),
        ("classifier.embeddings.weight", 1),
    ],
)
def test_layer_is_read_off_the_hub_name(name, scale):
    assert scales([name], 2, layer_decay=0.5) == [scale]


def test_groups_have_one_rate_and_one_weight_decay_each_and_a_fixed_order(model):
    settings = {"lr": 0.4, "layer_decay": 0.5, "head_lr_scale": 3, "weight_decay": 0.1}
    groups = groups_of(model.hub_parameters(), **settings)
    backwards = groups_of(reversed(list(model.hub_parameters())), **settings)
    for found in (groups, backwards):
        assert [(group.get("lr"), group["weight_decay"]) for group in found] == [
            (0.0125, 0.1), (0.0125, 0), (0.025, 0.1), (0.025, 0), (0.05, 0.1), (0.05, 0),
            (0.1, 0.1), (0.1, 0), (0.2, 0.1), (0.2, 0), (None, 0), (0.4 * 3, 0.1), (0.4 * 3, 0),
        ]  # fmt: skip
    assert [names_of(model, group) for group in groups] == [
        names_of(model, group) for group in backwards
    ]
    assert names_of(model, groups[10]) == {"vit.layernorm.weight", "vit.layernorm.bias"}
    assert names_of(model, groups[11]) == {"classifier.weight"}
    optimizer = build_optimizer(groups, OptimSection(), lr=0.4)
    ratios = learning_rate_ratios(optimizer, 0.4)
    powers = [0.03125, 0.0625, 0.125, 0.25, 0.5]
    expected = [*(power for power in powers for _ in range(2)), 1, 3, 3]
    assert ratios == pytest.approx(expected, rel=1e-12)


def test_rates_of_groups_follow_the_rate_for_256_images(model):
    """128 images per update: half of `optim.base_lr`."""
    config = Config(
        optim=OptimSection(base_lr=0.8, head_lr_scale=2), batch={"gradient_accumulation": 128}
    )
    assert config.peak_lr == 0.4
    groups = parameter_groups(model.hub_parameters(), config, depth=4)
    assert [group.get("lr") for group in groups] == [None, None, 0.8, 0.8]


def test_process_with_some_stages_has_the_scales_of_the_whole_model(make_config):
    whole = module_of(make_config()).model
    part = module_of(make_config()).model.keep([2])
    (weight, vector), all_groups = (
        groups_of(model.hub_parameters(), layer_decay=0.5) for model in (part, whole)
    )
    expected = {name: group["lr"] for group in all_groups[:-2] for name in names_of(whole, group)}
    for group in (weight, vector):
        assert {expected[name] for name in names_of(part, group)} == {group["lr"]} == {2e-4 / 4}


def frozen(model, groups):
    trained = set().union(*(names_of(model, group) for group in groups))
    return {name for name, _ in model.hub_parameters()} - trained


def test_frozen_trunk_leaves_the_head(model):
    groups = groups_of(model.hub_parameters(), freeze="trunk", weight_decay=0.1)
    assert [names_of(model, group) for group in groups] == [
        {"classifier.weight"}, {"classifier.bias"},
    ]  # fmt: skip
    assert [group["weight_decay"] for group in groups] == [0.1, 0]
    weight = nn.Parameter(torch.ones(2))
    others = [("fc_norm.weight", weight), ("vit.layernorm.weight", nn.Parameter(torch.ones(2)))]
    (group,) = groups_of(others, freeze="trunk")
    assert group["params"] == [weight]


@pytest.mark.parametrize("number", [1, 3, 4])
def test_frozen_layers_are_the_embeddings_and_the_first_ones(model, number):
    names = frozen(model, groups_of(model.hub_parameters(), freeze=number))
    starts = ("vit.embeddings.", *(f"vit.encoder.layer.{i}." for i in range(number)))
    assert names == {name for name, _ in model.hub_parameters() if name.startswith(starts)}


def test_probe_trains_at_the_rate_of_the_head(model):
    groups = groups_of(model.hub_parameters(), freeze="trunk", lr=0.1, head_lr_scale=10)
    optimizer = build_optimizer(groups, OptimSection(), lr=0.1)
    assert learning_rate_ratios(optimizer, 0.1) == [10, 10]


def test_nesterov_is_a_setting_of_torchs_sgd():
    """Two updates of one weight with gradient 1, momentum 0.5, by hand.

    The velocity is 1, then 1.5; the steps are 1 + 0.5 * velocity: 1.5, then 1.75.
    """
    weight = nn.Parameter(torch.zeros(()))
    optim = OptimSection(name="sgd", momentum=0.5, nesterov=True)
    optimizer = build_optimizer([{"params": [weight]}], optim, lr=1.0)
    for expected in (-1.5, -3.25):
        weight.grad = torch.ones(())
        optimizer.step()
        assert weight.item() == expected
