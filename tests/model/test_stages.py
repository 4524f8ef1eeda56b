import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from cxr_vit.config.plans import StagePlan
from cxr_vit.data.images import read_gray
from cxr_vit.errors import CheckpointError
from cxr_vit.model.stages import Normalise, StagedViT
from cxr_vit.model.vit import hub_name


@pytest.fixture
def whole():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)


def staged(whole, layers):
    return StagedViT(whole, StagePlan.from_list(layers), mean=0.5, std=0.5).eval()


@pytest.mark.parametrize("layers", [[4], [1, 1, 1, 1], [0, 3, 1], [2, 2, 0]])
def test_stages_compute_the_logits_of_the_undivided_model(whole, images, layers):
    pixels = ((images.float() / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1)
    with torch.no_grad():
        assert torch.allclose(staged(whole, layers)(images), whole(pixels).logits, atol=1e-6)


@pytest.mark.parametrize("layers", [[4], [1, 1, 1, 1], [0, 3, 1]])
def test_parameter_names_do_not_depend_on_the_split(whole, layers):
    expected = {hub_name(name) for name in whole.state_dict()}
    assert {name for name, _ in staged(whole, layers).hub_parameters()} == expected


def test_each_stage_holds_only_its_own_layers(whole):
    model = staged(whole, [1, 3])
    names = [hub_name(name) for name, _ in model.stages[0].named_parameters()]
    assert any(name.startswith("vit.embeddings") for name in names)
    assert any(name.startswith("vit.encoder.layer.0.") for name in names)
    assert not any(name.startswith(("vit.encoder.layer.1.", "classifier")) for name in names)


def test_stages_share_the_parameters_of_the_undivided_model(whole):
    model = staged(whole, [2, 2])
    assert {id(p) for p in model.parameters()} == {id(p) for p in whole.parameters()}


def test_the_undivided_model_works_as_before_and_can_be_pickled(whole, images):
    pixels = images.float().expand(-1, 3, -1, -1)
    with torch.no_grad():
        # transformers' own hooks, from its first call with hidden states on, cannot be pickled.
        expected = copy.deepcopy(whole)(pixels, output_hidden_states=True)
        model = staged(whole, [2, 2])
        again = pickle.loads(pickle.dumps(model))
        for undivided in (pickle.loads(pickle.dumps(whole)), whole):
            found = undivided(pixels, output_hidden_states=True)
            assert torch.equal(found.logits, expected.logits)
            assert len(found.hidden_states) == 5
            assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
        factors = torch.full((3, 8), 0.5)
        assert torch.equal(again(images, factors), model(images, factors))


def test_normalisation_maps_bytes_to_model_input():
    images = torch.tensor([0, 127, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    pixels = Normalise(mean=0.5, std=0.25, num_channels=3)(images)
    assert pixels.shape == (3, 3, 1, 1)
    assert pixels[:, 0].flatten().tolist() == pytest.approx([-2.0, -0.0078431, 2.0], abs=1e-6)
    assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_input_equals_that_of_the_saved_image_processor(whole, tmp_path):
    model = staged(whole, [4])
    for name, text in model.hub_files().items():
        (tmp_path / name).write_text(text)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    ours = model.stages[0].normalise(
        torch.from_numpy(read_gray(tmp_path / "image.png", 16))[None, None]
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    with Image.open(tmp_path / "image.png") as image:
        theirs = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_weights_are_restored(whole, images):
    model = staged(whole, [2, 2])
    weights = model.weights()
    with torch.no_grad():
        before = model(images)
        for parameter in model.parameters():
            parameter.zero_()
        assert not torch.allclose(model(images), before)
        model.load_weights(weights)
        assert torch.equal(model(images), before)


def test_weights_are_copies(whole):
    model = staged(whole, [4])
    weights = model.weights()
    with torch.no_grad():
        model.stages[0].classifier.bias.add_(1)
    assert not torch.equal(weights["classifier.bias"], model.stages[0].classifier.bias)


def test_weights_of_another_model_are_refused_by_name(whole):
    model = staged(whole, [4])
    weights = model.weights()
    weights["classifier.bias"] = torch.zeros(7)
    del weights["vit.layernorm.bias"]
    weights["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        model.load_weights(weights)
    for problem in ("missing vit.layernorm.bias", "unexpected extra", "classifier.bias is [7]"):
        assert problem in str(caught.value)


def test_recut_shares_every_parameter(whole, images):
    model = staged(whole, [1, 3])
    other = model.recut(StagePlan.from_list([2, 1, 1]))
    assert other.plan.num_stages == 3
    assert {id(p) for p in other.parameters()} == {id(p) for p in model.parameters()}
    with torch.no_grad():
        assert torch.equal(model(images), other(images))


def test_hidden_states_have_the_dtype_of_the_computation(whole, images):
    seen = []
    model = staged(whole, [2, 2]).compute_in(torch.bfloat16)
    model.to(torch.bfloat16)
    for stage in model.stages:
        for layer in stage.layers:
            layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    with torch.no_grad():
        assert model(images).dtype == torch.bfloat16
    assert seen == [torch.bfloat16] * 4
    assert model.recut(StagePlan.from_list([4])).dtype == torch.bfloat16


def test_half_weights_are_stored_in_fp32(whole):
    model = staged(whole, [4]).half()
    weights = model.weights()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    before = {name: parameter.clone() for name, parameter in model.hub_parameters()}
    model.load_weights(weights)
    assert all(torch.equal(before[name], p) for name, p in model.hub_parameters())
