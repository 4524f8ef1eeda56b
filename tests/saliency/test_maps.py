"""Maps against independent implementations: the matrices of the paper, and captum's Grad-CAM."""

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from cxr_vit.config.architectures import KINDS
from cxr_vit.config.plans import StagePlan
from cxr_vit.errors import ModelError
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import VitParts, layer_output
from cxr_vit.saliency.maps import METHODS, grad_cam, relevance
from families import FAMILIES, images, make, pixels

COLUMNS = [3, 0, 7]
#: Kind of model and pooling; with its own one, transformers' classifier is the reference.
POOLED = [(kind, KINDS[kind].pooling) for kind in FAMILIES]
POOLED += [("vit", "mean"), ("deit", "both"), ("dinov2", "class")]

pooled = pytest.mark.parametrize(("kind", "pooling"), POOLED)
every_method = pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))


def hub_model(kind, pooling, **settings):
    """Return a model of transformers whose head takes what the pooling gives."""
    hub = make(kind, **settings)
    width = hub.config.hidden_size
    if pooling != KINDS[kind].pooling:
        torch.manual_seed(3)
        hub.config.pooling = pooling
        hub.classifier = nn.Linear(2 * width if pooling == "both" else width, 14)
    if pooling == "mean":
        hub.fc_norm = nn.LayerNorm(width)
    return hub


def staged(hub, cut=(1, 1)):
    return StagedViT(hub, StagePlan.from_list(cut), mean=0.5, std=0.5).eval()


def logits_and_attentions(hub, kind, pooling, of):
    if pooling == KINDS[kind].pooling:
        found = hub(pixels(of), output_attentions=True)
        return found.logits, found.attentions
    found = getattr(hub, kind)(pixels(of), output_attentions=True, output_hidden_states=True)
    extra = KINDS[kind].extra_tokens
    if pooling == "mean":
        return hub.classifier(hub.fc_norm(found.hidden_states[-1][:, extra:].mean(1))), (
            found.attentions
        )
    hidden = found.last_hidden_state
    parts = [hidden[:, 0]] + ([hidden[:, extra:].mean(1)] if pooling == "both" else [])
    return hub.classifier(torch.cat(parts, dim=1)), found.attentions


def matrices_of_the_paper(hub, kind, pooling, image, column):
    """Return R without what a token has of itself, float32 ``[tokens, tokens]``, of one image."""
    logits, attentions = logits_and_attentions(hub, kind, pooling, image)
    gradients = torch.autograd.grad(logits[0, column], attentions)
    tokens = attentions[0].shape[-1]
    result = torch.eye(tokens)
    for attention, gradient in zip(attentions, gradients):
        of_heads = torch.relu(gradient[0] * attention[0]).detach()
        result = result + of_heads.mean(dim=0) @ result
    return result - torch.eye(tokens)


def expected_relevance(hub, kind, pooling, of, columns):
    extra, maps = KINDS[kind].extra_tokens, []
    for image in of:
        for column in columns:
            matrix = matrices_of_the_paper(hub, kind, pooling, image[None], column)
            rows = {"class": matrix[0], "mean": matrix[extra:].mean(0)}
            rows["both"] = (rows["class"] + rows["mean"]) / 2
            maps.append(rows[pooling][extra:].reshape(4, 4))
    return torch.stack(maps).reshape(len(of), len(columns), 4, 4)


@pooled
def test_relevance_is_that_of_the_papers_matrices(kind, pooling):
    """Of fused attention, also where the last layer computes the class token alone."""
    found = relevance(staged(hub_model(kind, pooling)), images(32), COLUMNS)
    eager = hub_model(kind, pooling, attn_implementation="eager")
    expected = expected_relevance(eager, kind, pooling, images(32), COLUMNS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.dtype == torch.float32 and found.amax(dim=(2, 3)).min() > 0
    torch.testing.assert_close(relevance(staged(eager), images(32), COLUMNS), found)


class Spatial(nn.Module):
    """A model that shows what enters its last layer as captum takes it, ``[B, width, 4, 4]``."""

    def __init__(self, hub, kind):
        super().__init__()
        self.parts, self.hub = VitParts(hub), hub
        self.extra = KINDS[kind].extra_tokens
        self.entering = nn.Identity()

    def forward(self, given):
        value = self.parts.embedding[1](given)
        *layers, last = (layer for _, layer in self.parts.layers)
        for layer in layers:
            value = layer_output(layer(value))
        first, patches = value[:, : self.extra], value[:, self.extra :]
        seen = self.entering(patches.transpose(1, 2).unflatten(2, (4, 4)))
        value = layer_output(last(torch.cat([first, seen.flatten(2).transpose(1, 2)], dim=1)))
        return self.parts.head[1](self.parts.pool(value, self.parts.norm[1]))


@pooled
def test_grad_cam_is_that_of_captum(kind, pooling):
    hub = hub_model(kind, pooling)
    found = grad_cam(staged(hub), images(32), COLUMNS)
    reference = Spatial(hub, kind)
    captum = LayerGradCam(reference, reference.entering)
    for place, column in enumerate(COLUMNS):
        expected = captum.attribute(pixels(images(32)), target=column, relu_attributions=True)
        torch.testing.assert_close(found[:, place], expected[:, 0].detach(), rtol=1e-5, atol=1e-5)
    assert found.amax() > 0


@every_method
def test_maps_depend_on_the_finding_and_not_on_the_other_images(method):
    model = staged(make("vit"))
    found = method(model, images(32), COLUMNS)
    assert found.shape == (3, 3, 4, 4)
    single = torch.cat([method(model, image[None], COLUMNS) for image in images(32)])
    torch.testing.assert_close(found, single)
    scaled = found / found.amax(dim=(2, 3), keepdim=True)
    assert (scaled[:, 0] - scaled[:, 1]).abs().amax() > 0.1
    assert torch.equal(method(model, images(32), COLUMNS[::-1]), found.flip(1))


@every_method
@pytest.mark.parametrize("frozen", ["nothing", "a layer", "everything"])
def test_frozen_models_have_the_same_maps_and_stay_as_they_are(method, frozen):
    model = staged(make("vit"))
    expected = method(model, images(32), COLUMNS)
    kept = {"nothing": [], "a layer": [model.layers[0]], "everything": [model]}[frozen]
    for part in kept:
        part.requires_grad_(False)
    with torch.no_grad():
        before = model(images(32))
        found = method(model, images(32), COLUMNS)  # no_grad of the caller changes nothing
        assert torch.equal(model(images(32)), before)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert not any(part.training for part in model.modules())


@every_method
def test_model_of_one_layer_has_maps(method):
    hub = make("vit", num_hidden_layers=1)
    assert method(staged(hub, (1,)), images(32), [0]).amax() > 0


class Mean(nn.Module):
    """Mixes the tokens without attention."""

    def forward(self, hidden, *_args, **_options):
        return hidden.mean(dim=1, keepdim=True).expand_as(hidden), None


def test_relevance_of_a_model_without_attention_is_refused():
    hub = make("vit")
    VitParts(hub).layers[1][1].attention = Mean()
    with pytest.raises(ModelError, match=r"1 of 2 layers.*grad_cam"):
        relevance(staged(hub), images(32), [0])
    assert grad_cam(staged(hub), images(32), [0]).shape == (3, 1, 4, 4)
