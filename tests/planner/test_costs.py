"""Parameters, operations and activations, compared with the real model."""

import json

import pytest
import torch
import transformers
from transformers import DeiTConfig, Dinov2Config, ViTConfig, ViTForImageClassification

from conftest import module_of
from cxr_vit.config import read_config
from cxr_vit.config.architectures import KINDS, SIZES
from cxr_vit.errors import ConfigError
from cxr_vit.planner.costs import ModelShape, inference_cost, stage_cost
from families import FAMILIES, images, make, pixels, save

from .shapes import base_shape, pod4, quarters


def counted(config):
    """Return the planner's parameters of each stage."""
    layers, shape = config.pipeline.layers_per_stage, ModelShape.from_config(config)
    last = len(layers) - 1
    return [
        stage_cost(shape, num_layers=count, is_first=stage == 0, is_last=stage == last).tensors
        for stage, count in enumerate(layers)
    ]


def real(config):
    """Return the elements of each parameter of each stage of Hugging Face's model."""
    model = module_of(config).model
    return [[weight.numel() for weight in stage.parameters()] for stage in model.stages]


def test_vit_base_has_the_published_parameters():
    shape = base_shape()
    assert sum(shape.layer_tensors()) == 7_087_872
    assert sum(shape.embedding_tensors()) == 742_656
    assert sum(shape.head_tensors()) == 12_302
    assert sum(sum(stage) for stage in counted(pod4())) == 85_809_422
    # docs/ipu.md, section 3
    assert [sum(stage) for stage in counted(pod4())] == [
        *(22_006_272, 21_263_616, 21_263_616, 21_275_918)
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.name=vit-base"],
        ["model.name=vit-micro", "model.patch_size=8", "pipeline.layers_per_stage=[1,1,1,1]"],
        ["model.name=vit-tiny", "pipeline.layers_per_stage=[0,5,7]"],
        ["model.name=vit-small", "pipeline.layers_per_stage=[12]", "data.include_no_finding=true"],
    ],
)
def test_parameters_of_each_stage_are_the_real_models(overrides):
    config = pod4(*overrides)
    assert [sorted(stage) for stage in counted(config)] == [sorted(stage) for stage in real(config)]


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@pytest.mark.parametrize("settings", [{}, {"qkv_bias": False, "image_size": [32, 64]}])
def test_parameters_of_a_folder_are_those_of_the_model_built_of_it(kind, settings, tmp_path):
    save(kind, tmp_path, **settings)
    config = pod4(f"model.name={tmp_path}", "data.image_size=48", "pipeline.layers_per_stage=[1,1]")
    assert [sorted(stage) for stage in counted(config)] == [sorted(stage) for stage in real(config)]
    model, shape = module_of(config).model, ModelShape.from_config(config)
    assert (shape.tokens, shape.hidden_size) == model.hidden_shape


def test_operations_of_the_forward_pass_are_the_published_ones():
    # timm, benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv: 17.58 GMACs with 1,000 classes
    forward = sum(stage.forward_flops for stage in quarters(keeps_all=True))
    assert forward / 2 == pytest.approx(17.58e9, rel=0.002)


@pytest.mark.parametrize(("name", "layers"), [("vit-micro", [4]), ("vit-tiny", [12])])
def test_operations_are_those_that_torch_counts(name, layers):
    flop_counter = pytest.importorskip("torch.utils.flop_counter", reason="torch 2.1 has it")
    config = pod4(
        f"model.name={name}", f"pipeline.layers_per_stage={layers}", "model.patch_size=16"
    )
    # torch counts no operations of fused attention on a CPU.
    model = module_of(config, for_ipu=True).model
    images = torch.zeros(1, 1, 224, 224, dtype=torch.uint8)
    with flop_counter.FlopCounterMode(display=False) as forward:
        logits = model(images)
    with flop_counter.FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    shape = ModelShape.from_config(config)
    cost = stage_cost(shape, num_layers=sum(layers), is_first=True, is_last=True, recomputes=False)
    assert forward.get_total_flops() == pytest.approx(cost.forward_flops, rel=1e-3)
    assert backward.get_total_flops() == pytest.approx(cost.backward_flops, rel=1e-3)


def tiny_model(depth, attention):
    """Return Hugging Face's ViT-Ti/16 with random weights."""
    config = ViTConfig(
        num_hidden_layers=depth,
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        attn_implementation=attention,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config).train()


def saved_bytes(depth, *, images, attention, autocast=False):
    """Return the bytes that torch saves for a ViT-Ti/16's backward pass, without parameters."""
    model = tiny_model(depth, attention)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # kept alive: no address is reused
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(pixel_values=torch.zeros(images, 3, 224, 224))
    return sum(size for size, _ in kept.values())


TINY = ModelShape(192, 12, 3, 768, 16, 3, 224, 14, 224 * 224)


def saved_of_a_layer(*, images, attention, autocast=False):
    deep, shallow = (
        saved_bytes(depth, images=images, attention=attention, autocast=autocast)
        for depth in (3, 1)
    )
    return (deep - shallow) / 2


needs_transformers_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="transformers 4 also saves reshaped copies",
)


@needs_transformers_5
def test_activations_of_a_layer_are_those_that_torch_saves():
    saved = saved_of_a_layer(images=2, attention="eager")
    assert saved == pytest.approx(2 * 4 * TINY.layer_activations(), rel=0.01)


def saved_by_norm(images):
    """Return the bytes that torch saves after each layer norm of the second of three layers."""
    model, part = tiny_model(3, "eager"), [""]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, found = {}, {}

    def enter(name):
        return lambda module, inputs: part.__setitem__(0, name)

    for name, module in model.named_modules():
        if name.endswith(("layernorm_before", "layernorm_after")):
            module.register_forward_pre_hook(enter(name))

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {*own, *kept}:
            kept[storage.data_ptr()] = tensor  # kept alive: no address is reused
            found[part[0]] = found.get(part[0], 0) + storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(pixel_values=torch.zeros(images, 3, 224, 224))
    return [size for name, size in found.items() if ".1." in name]


@needs_transformers_5
def test_halves_of_a_layer_are_those_that_torch_saves():
    attention, mlp = saved_by_norm(images=2)
    assert attention == pytest.approx(2 * 4 * TINY.attention_activations(), rel=0.01)
    assert mlp == pytest.approx(2 * 4 * TINY.mlp_activations(), rel=0.01)


@needs_transformers_5
def test_layer_scale_keeps_its_inputs_as_torch_does():
    def saved(depth):
        model = make("dinov2", head=False, num_hidden_layers=depth, attn_implementation="eager")
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = tensor  # kept alive: no address is reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pixels(images(32, 1)))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    shape = ModelShape(24, 2, 3, 48, 8, 3, 32, 14, 32 * 32, KINDS["dinov2"])
    # Some numbers per token of each layer norm besides.
    assert saved(3) - saved(2) == pytest.approx(4 * shape.layer_activations(), rel=0.03)


@needs_transformers_5
def test_a_stage_that_recomputes_nothing_keeps_what_torch_saves():
    saved = saved_of_a_layer(images=2, attention="eager")
    cost = stage_cost(
        TINY, num_layers=3, is_first=False, is_last=False, recomputes=False, stashes=True
    )
    kept = cost.kept + TINY.hidden_elements  # the stage's input is kept anyway
    assert 3 * saved == pytest.approx(2 * 4 * kept, rel=0.01)
    assert cost.recompute_flops == 0


def test_weights_that_are_kept_are_those_that_torch_reads_in_backward():
    def read_in_backward(depth):
        model, found = tiny_model(depth, "eager"), {}
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() in weights and tensor.dim() == 2:
                found[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pixel_values=torch.zeros(1, 3, 224, 224))
        return sum(found.values())

    cost = stage_cost(
        TINY, num_layers=2, is_first=False, is_last=False, recomputes=False, stashes=True
    )
    assert cost.kept_weights == read_in_backward(3) - read_in_backward(1)


@pytest.mark.parametrize("stashes", [True, False])
def test_nothing_is_stashed_where_backward_follows_forward(stashes):
    last = stage_cost(
        TINY, num_layers=3, is_first=False, is_last=True, recomputes=False, stashes=stashes
    )
    assert (last.kept, last.kept_weights) == (0, 0)
    assert last.live == 3 * TINY.layer_activations() + TINY.layer_gradients()


def test_kept_outputs_of_attention_halve_what_is_live():
    shape = base_shape()
    whole = {"num_layers": 3, "is_first": False, "kept": (0, 1, 2)}
    for is_last, outputs in ((False, 2), (True, 3)):
        layers = stage_cost(shape, **whole, is_last=is_last)
        halves = stage_cost(shape, **whole, is_last=is_last, attentions=(0, 1, 2))
        assert layers.kept == outputs * shape.hidden_elements
        assert halves.kept == layers.kept + 3 * shape.hidden_elements, "one per layer"
        larger = max(shape.attention_activations(), shape.mlp_activations())
        assert halves.live == larger + shape.layer_gradients()
        assert halves.recompute_flops == layers.recompute_flops


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("is_last", [True, False])
def test_a_stage_of_evaluation_is_the_forward_pass_of_training(is_first, is_last):
    ends = {"num_layers": 3, "is_first": is_first, "is_last": is_last}
    training, evaluation = stage_cost(TINY, **ends), inference_cost(TINY, **ends)
    assert evaluation.flops == evaluation.forward_flops == training.forward_flops
    assert evaluation.tensors == training.tensors
    assert (evaluation.kept, evaluation.kept_weights) == (0, 0)
    assert evaluation.live < TINY.layer_activations()
    assert 2 * evaluation.passed == training.passed, "no gradients come back"


@needs_transformers_5
def test_autocast_saves_two_and_a_half_bytes_per_activation_and_the_cast_weights():
    many, few = (
        saved_of_a_layer(images=images, attention="sdpa", autocast=True) for images in (8, 2)
    )
    per_image = (many - few) / 6
    fused = TINY.layer_activations() - TINY.num_heads * TINY.tokens**2
    assert per_image == pytest.approx(2.5 * fused, rel=0.02)
    cast = few - 2 * per_image
    assert cast == pytest.approx(2 * sum(TINY.layer_tensors()), rel=0.01)


def test_activations_of_a_vit_base_layer_in_fp16():
    shape = base_shape()
    bytes_per_layer = 2 * shape.layer_activations()
    assert bytes_per_layer == 32 * 197 * 768 + 2 * 12 * 197**2
    assert bytes_per_layer / 1e6 == pytest.approx(5.8, abs=0.05)


def test_the_last_stage_recomputes_up_to_its_last_kept_output_and_others_everything():
    whole = {"num_layers": 3, "is_first": False}
    layer = base_shape().layer_flops()
    middle = stage_cost(base_shape(), **whole, is_last=False)
    assert middle.recompute_flops == middle.forward_flops == 3 * layer
    for kept, again in [((), 0), ((0,), 1), ((0, 1, 2), 3)]:
        last = stage_cost(base_shape(), **whole, is_last=True, kept=kept)
        assert last.recompute_flops == again * layer


def test_live_activations_span_the_layers_between_two_kept_outputs():
    shape = base_shape()
    live = [
        stage_cost(shape, num_layers=5, is_first=False, is_last=False, kept=kept).live
        for kept in [(), (1,), (1, 3), (0, 1, 2, 3, 4)]
    ]
    spans = [(value - shape.layer_gradients()) / shape.layer_activations() for value in live]
    assert spans == [5, 3, 2, 1]


def test_images_need_no_gradient():
    shape = base_shape()
    alone = stage_cost(shape, num_layers=0, is_first=True, is_last=False, recomputes=False)
    assert alone.backward_flops == alone.forward_flops == shape.embedding_flops()


def test_shape_of_a_folder_is_read_from_its_config(tmp_path):
    settings = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50,
        patch_size=8, image_size=32,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings.to_diff_dict()))
    config = read_config([], [f"model.name={tmp_path}", "data.image_size=32"])
    shape = ModelShape.from_config(config)
    assert shape[:6] == (24, 2, 3, 50, 8, 3)
    assert shape.tokens == 17


def test_hub_name_implies_size_and_patches():
    shape = ModelShape.from_config(read_config([], ["model.name=google/vit-large-patch32-384"]))
    assert shape.hidden_size == SIZES["vit-large"].hidden_size
    assert shape.patch_size == 32


@pytest.mark.parametrize(
    ("name", "size", "patch", "tokens"),
    [
        ("facebook/deit-small-patch16-224", "vit-small", 16, 197),
        ("facebook/deit-tiny-distilled-patch16-224", "vit-tiny", 16, 198),
        ("timm/vit_base_patch16_224.augreg_in21k", "vit-base", 16, 197),
        ("timm/deit_small_distilled_patch16_224.fb_in1k", "vit-small", 16, 198),
        ("facebook/dinov2-large", "vit-large", 14, 257),
        ("microsoft/rad-dino", "vit-base", 14, 257),
        ("facebook/vit-mae-base", "vit-base", 16, 197),
        ("facebook/vit-mae-huge", "vit-huge", 14, 257),
    ],
)
def test_hub_name_implies_the_kind(name, size, patch, tokens):
    shape = ModelShape.from_config(read_config([], [f"model.name={name}"]))
    assert (shape.hidden_size, shape.patch_size) == (SIZES[size].hidden_size, patch)
    assert shape.tokens == tokens
    assert shape.head_size == shape.hidden_size * (2 if "dino" in name else 1)


def test_head_takes_what_model_pooling_says(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "pooling": "both"}')
    for name, pooling, inputs in (
        ("vit-tiny", "both", 2), ("vit-tiny", "mean", 1), ("facebook/dinov2-small", "class", 1),
        (tmp_path, "null", 2), (tmp_path, "mean", 1),
    ):  # fmt: skip
        overrides = [f"model.name={name}", f"model.pooling={pooling}"]
        shape = ModelShape.from_config(read_config([], overrides))
        assert shape.head_size == inputs * shape.hidden_size
        assert shape.head_tensors()[2] == inputs * shape.hidden_size * shape.num_labels


def test_published_parameters_of_dinov2():
    # Base, published as 86 M: 85,798,656 of a ViT-B/16's trunk, patches of 14 pixels, LayerScale.
    shape = ModelShape.from_config(
        read_config([], ["model.name=facebook/dinov2-base", "data.image_size=518"])
    )
    trunk = sum(shape.embedding_tensors()) + 12 * sum(shape.layer_tensors()) + 2 * 768
    assert trunk == 86_579_712


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2"])
def test_absent_keys_of_a_config_have_hugging_faces_defaults(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    config = read_config([], [f"model.name={tmp_path}", "data.image_size=224"])
    shape = ModelShape.from_config(config)
    theirs = {"vit": ViTConfig, "deit": DeiTConfig, "dinov2": Dinov2Config}[kind]()
    assert shape[:4] == (
        *(theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads),
        getattr(theirs, "intermediate_size", 3072),
    )
    assert (shape.patch_size, shape.num_channels) == ({"dinov2": 14}.get(kind, 16), 3)


def test_folder_of_timm_is_known_after_loading(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(ConfigError, match="is known after loading") as caught:
        ModelShape.from_config(read_config([], [f"model.name={tmp_path}"]))
    assert "folder with its config.json" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("facebook/dinov2-giant", "facebook/dinov2-with-registers-base"),
        *("someone/my-dinov2-base", "someone/not-rad-dino", "someone/my-vit-mae-base"),
        *("timm/vit_base_patch14_dinov2.lvd142m", "timm/vit_base_patch14_reg4_dinov2.lvd142m"),
    ],
)
def test_other_kinds_are_not_implied(name):
    with pytest.raises(ConfigError, match="does not imply its size"):
        ModelShape.from_config(read_config([], [f"model.name={name}"]))


def test_unknown_model_name_is_refused():
    with pytest.raises(ConfigError, match="owner/model does not imply its size"):
        ModelShape.from_config(read_config([], ["model.name=owner/model"]))
