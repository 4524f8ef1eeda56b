import pytest
import torch
from torch import nn

from conftest import module_of
from cxr_vit.engines.ipu.graphs import cast_weights_to_input, set_compute_dtype

HALF = torch.bfloat16  # the 16-bit dtype in which torch 2.0.1 computes on a CPU


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (2, 6)),
        (nn.Linear(6, 4, bias=False), (2, 6)),
        (nn.Conv2d(3, 4, 2, stride=2), (2, 3, 4, 4)),
        (nn.LayerNorm(6), (2, 6)),
    ],
)
def test_layer_computes_in_the_dtype_of_its_input(layer, shape):
    value = torch.randn(shape)
    with torch.no_grad():
        exact = layer(value)
    parameters = dict(layer.named_parameters())
    cast_weights_to_input(layer)
    with torch.no_grad():
        assert torch.equal(layer(value), exact)
        rounded = layer(value.to(HALF))
    assert rounded.dtype == HALF
    assert torch.allclose(rounded.float(), exact, atol=0.1)
    assert dict(layer.named_parameters()) == parameters


def test_gradients_of_the_weights_are_fp32():
    layer = nn.Linear(6, 4)
    cast_weights_to_input(layer)
    layer(torch.randn(2, 6).to(HALF)).sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    assert layer.weight.grad.abs().sum() > 0


@pytest.fixture(params=["class", "mean", "both"])
def model(make_config, request):
    config = make_config(f"model.pooling={request.param}")
    return module_of(config, for_ipu=True).model


def test_every_layer_of_a_vit_computes_in_half_precision(model):
    set_compute_dtype(model, HALF)
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            seen[name] = {x.dtype for x in (*inputs, output)}

        return hook

    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)) and not list(module.children()):
            module.register_forward_hook(note(name))
    logits = model(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))
    assert logits.dtype == HALF
    assert len(seen) > 20
    assert {name: dtypes for name, dtypes in seen.items() if dtypes != {HALF}} == {}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_half_precision_is_close_to_fp32(model):
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        exact = model(images)
        set_compute_dtype(model, HALF)
        near = model(images).float()
    assert 0 < (near - exact).abs().max() < 0.05


def test_fp32_changes_no_layer(model):
    kinds = [type(module) for module in model.modules()]
    set_compute_dtype(model, torch.float32)
    assert [type(module) for module in model.modules()] == kinds
