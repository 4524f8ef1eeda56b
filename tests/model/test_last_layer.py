"""With the class token alone in the head, the last layer computes that token alone."""

import functools
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

from cxr_vit.config.plans import StagePlan
from cxr_vit.model import stages
from cxr_vit.model.drop_path import DropPath
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import Pool, VitParts, tokens_read
from families import CURRENT, FAMILIES, images, make, needs_current

fused = needs_current("vit")


def model_of(hub, cut=(2,)):
    """Return a model in stages whose head reads the class token."""
    hub.config.pooling = "class"
    hub.classifier = nn.Linear(hub.config.hidden_size, 14, dtype=hub.classifier.weight.dtype)
    return StagedViT(hub, StagePlan.from_list(cut), mean=0.5, std=0.5)


def read(model):
    parts = VitParts(model._undivided[0])
    return tokens_read(parts.pool, parts.layers[-1][1], parts.norm[1])


def seen(model):
    """Run a model; return the tokens that the head's norm gets."""
    shapes = []
    with torch.no_grad(), mock.patch.object(
        stages.Stage, "_classify", lambda self, tokens, hidden, paths: shapes.append(hidden.shape)
    ):
        model(images(32))
    return shapes[0][1]


def results(model, paths):
    """Return logits and gradients by name."""
    model.zero_grad()
    logits = model(images(32, 4), paths)
    (logits * torch.randn(logits.shape, generator=torch.manual_seed(2))).sum().backward()
    named = {name: weight.grad for name, weight in model.hub_parameters() if "mask" not in name}
    assert not [name for name, gradient in named.items() if gradient is None]
    return {"logits": logits.detach(), **{name: grad.clone() for name, grad in named.items()}}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("rate", [0, 0.5])
@pytest.mark.parametrize("kind", CURRENT)
def test_logits_and_gradients_are_those_of_the_full_layer(kind, rate, dtype, tolerance):
    """The models of `make` have layer scales of all sizes."""
    model = model_of(make(kind).to(dtype)).compute_in(dtype).train()
    paths = DropPath(rate, 2, seed=0).factors(0, torch.arange(4), 4)
    assert read(model) == 1 and seen(model) == 1
    found = results(model, paths)
    with mock.patch.object(stages, "tokens_read", return_value=None):
        assert seen(model) == 16 + (2 if kind == "deit" else 1)
        expected = results(model, paths)
    for name, value in expected.items():
        # The key's bias changes no attention: its gradient is rounding alone.
        scale = expected[name.replace("key.bias", "value.bias")].abs().max()
        assert (found[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("kind", CURRENT)
def test_the_last_layer_has_fewer_products(kind):
    counter = pytest.importorskip("torch.utils.flop_counter", reason="needs a newer torch")
    model = model_of(make(kind)).train()

    def operations():
        with counter.FlopCounterMode(display=False) as counted:
            model(images(32)).sum().backward()
        return counted.get_total_flops()

    found = operations()
    with mock.patch.object(stages, "tokens_read", return_value=None):
        expected = operations()
    hidden, mlp, tokens, count = 24, 48, 16 + (2 if kind == "deit" else 1), 3
    # Query, output projection and MLP of all other tokens; one product forward, two backward.
    spared = 3 * 2 * count * (tokens - 1) * (2 * hidden * hidden + 2 * hidden * mlp)
    # The products of attention itself: torch counts none of the fused ones on a CPU.
    assert expected - found == spared


@pytest.mark.parametrize("cut", [(1, 1), (0, 2, 0), (1, 1, 0)])
def test_a_cut_changes_no_bit(cut):
    hub = make("vit", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    whole = model_of(hub).train()
    torch.manual_seed(0)
    expected = results(whole, None)
    parts = whole.recut(StagePlan.from_list(cut)).train()
    shapes = []
    for stage in parts.stages:
        stage.register_forward_hook(lambda stage, inputs, output: shapes.append(output.shape))
    torch.manual_seed(0)
    found = results(parts, None)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert set(shapes[:-1]) == {(4, *whole.hidden_shape)}


def test_dropout_is_of_training_alone():
    plain, dropping = (
        model_of(make("dinov2", hidden_dropout_prob=0, attention_probs_dropout_prob=rate))
        for rate in (0, 0.5)
    )
    dropping.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = plain(images(32))
        assert torch.equal(dropping.eval()(images(32)), expected)
        assert not torch.equal(dropping.train()(images(32)), expected)


@fused
def test_attention_of_the_class_token_drops_out_as_transformers_does(monkeypatch):
    """The second layer is the last one."""
    rates, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*tensors, **named):
        rates.append((tensors[0].shape[2], named.get("dropout_p", (*tensors, 0, 0)[4])))
        return attend(*tensors, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model = model_of(make("vit", attention_probs_dropout_prob=0.25))
    for mode, rate in ((True, 0.25), (False, 0.0)):
        rates.clear()
        model.train(mode)(images(32))
        assert rates == [(17, rate), (1, rate)]


# Where somebody would notice


class Own(nn.Linear):
    pass


def last_of(model):
    return VitParts(model._undivided[0]).layers[-1][1]


def with_hook(part, kind="forward_hook"):
    getattr(part, f"register_{kind}")(lambda *arguments: None)


def with_forward(part):
    part.forward = part.forward


def of_a_user(part):
    kind = type(part)
    part.__class__ = type("Mine", (kind,), {"__module__": __name__})


#: What is done to a model, so that its last layer computes all tokens.
NOTICED = {
    "layer's hook": lambda model: with_hook(last_of(model)),
    "layer's pre-hook": lambda model: with_hook(last_of(model), "forward_pre_hook"),
    "backward hook": lambda model: with_hook(last_of(model), "full_backward_hook"),
    "attention's hook": lambda model: with_hook(model.attentions[-1]),
    "hook of the norm of the head": lambda model: with_hook(VitParts(model._undivided[0]).norm[1]),
    "hook of every product": lambda model: [
        with_hook(part) for part in last_of(model).modules() if isinstance(part, nn.Linear)
    ],
    "layer's own forward": lambda model: with_forward(last_of(model)),
    "attention's own forward": lambda model: with_forward(model.attentions[-1]),
    "layer's class": lambda model: of_a_user(last_of(model)),
    "attention's class": lambda model: of_a_user(model.attentions[-1]),
    "class of a product": lambda model: of_a_user(
        next(part for part in last_of(model).modules() if isinstance(part, nn.Linear))
    ),
    "norm over the batch": lambda model: setattr(
        last_of(model), "layernorm_after", nn.BatchNorm1d(17)
    ),
}


@fused
@pytest.mark.parametrize("what", NOTICED)
def test_the_whole_layer_is_computed_where_somebody_would_notice(what):
    model = model_of(make("vit")).eval()
    with torch.no_grad():
        before = model(images(32))
        assert seen(model) == 1
        NOTICED[what](model)
        assert read(model) is None and seen(model) == 17
        if what != "norm over the batch":
            assert torch.allclose(model(images(32)), before, rtol=1e-4, atol=1e-5)


def test_hooks_come_and_go():
    model, shapes = model_of(make("vit")).eval(), []

    def note(module, inputs, output):
        shapes.append(tuple((output[0] if isinstance(output, tuple) else output).shape))

    with torch.no_grad():
        before = model(images(32))
        hooks = [
            part.register_forward_hook(note) for part in (last_of(model), model.attentions[-1])
        ]
        model(images(32))
        assert shapes == [(3, 17, 24)] * 2
        for hook in hooks:
            hook.remove()
        assert torch.equal(model(images(32)), before) and len(shapes) == 2


def patched(calls, function):
    @functools.wraps(function)
    def noted(*arguments, **named):
        calls.append(function)
        return function(*arguments, **named)

    return noted


@fused
@pytest.mark.parametrize("what", ["layer", "layer with factors", "attention", "norm"])
def test_a_forward_that_is_set_on_a_class_is_called(what, monkeypatch):
    model, calls = model_of(make("vit")).eval(), []
    part = VitParts(model._undivided[0]).norm[1] if what == "norm" else last_of(model)
    kind = type(part.attention if what == "attention" else part)
    kind = kind.__base__ if what == "layer" else kind  # Hugging Face's own
    with torch.no_grad():
        before = model(images(32))
        monkeypatch.setattr(kind, "forward", patched(calls, kind.forward))
        assert torch.allclose(model(images(32)), before, rtol=1e-4, atol=1e-5)
    assert len(calls) == (5 if what == "norm" else 2)


@fused
def test_an_attention_that_is_registered_instead_of_that_of_transformers_is_called():
    model, calls = model_of(make("vit")).eval(), []
    attention = transformers.AttentionInterface()
    own = attention["sdpa"]
    with torch.no_grad():
        before = model(images(32))
        transformers.AttentionInterface.register("sdpa", patched(calls, own))
        try:
            assert torch.allclose(model(images(32)), before, rtol=1e-4, atol=1e-5)
        finally:
            transformers.AttentionInterface.register("sdpa", own)
        assert len(calls) == 2
        assert torch.equal(model(images(32)), before) and len(calls) == 2


@fused
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_all_modules_see_every_token(kind, monkeypatch):
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", None)
    model = model_of(make("vit"))
    hook = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *arguments: None)
    try:
        assert read(model) is None
        assert "backward" in kind or seen(model) == 17
    finally:
        hook.remove()
    assert read(model) == 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_hooks_that_transformers_leaves_behind_change_no_bit(kind):
    """They are in the modules of this process, and not in those of a resumed run."""
    model = model_of(make(kind)).eval()
    with torch.no_grad():
        before, count = model(images(32)), read(model)
        for what in ("output_hidden_states", "output_attentions"):
            getattr(model._undivided[0], kind)(torch.zeros(1, 3, 32, 32), **{what: True})
        assert read(model) == count and torch.equal(model(images(32)), before)


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_attention_and_other_pooling_compute_the_whole_layer(kind):
    assert read(model_of(make(kind, attn_implementation="eager"))) is None
    parts = VitParts(model_of(make(kind))._undivided[0])
    layer, norm, extra = parts.layers[-1][1], parts.norm[1], parts.pool.extra_tokens
    found = [tokens_read(Pool(word, extra), layer, norm) for word in ("class", "mean", "both")]
    assert found == [1 if hasattr(layer.attention, "q_proj") else None, None, None]
