import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from cxr_vit.config.schema import ModelSection
from cxr_vit.data.labels import FINDINGS
from cxr_vit.errors import ModelError
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.vit import build_vit, check_source, hub_name

#: Positives of the 14 findings among the 75,312 training images of the community's official split
#: (Wang et al. 2017, v2020 labels).
NIH_POSITIVES = [
    7205, 1501, 7649, 12036, 3574, 4060, 770, 2244, 2480, 1210, 1250, 1083, 1927, 126,
]  # fmt: skip
NIH_TRAINING_IMAGES = 75312

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def build(name, *, image_size=32, layers=(1, 1), prevalence=0.1, names=FINDINGS, **settings):
    return build_vit(
        ModelSection(name=str(name), **settings),
        names=names,
        image_size=image_size,
        layers_per_stage=layers,
        seed=0,
        prevalence=None if prevalence is None else np.full(len(names), prevalence),
    )


@pytest.fixture
def trunk(tmp_path):
    """A checkpoint like the hub's in21k one: with a pooler, without head and `vit.` prefix."""
    folder = tmp_path / "in21k"
    ViTModel(ViTConfig(**TINY)).save_pretrained(folder)
    weights = load_file(str(folder / "model.safetensors"))
    assert "pooler.dense.weight" in weights
    return folder


def edit_weights(folder, change):
    path = str(folder / "model.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_hub_names_are_those_of_transformers_4():
    names = {hub_name(name) for name in build("vit-micro", layers=(4,), patch_size=8).state_dict()}
    assert "vit.encoder.layer.3.attention.attention.query.weight" in names
    assert "vit.encoder.layer.3.attention.output.dense.bias" in names
    assert "vit.encoder.layer.0.intermediate.dense.weight" in names
    assert "vit.encoder.layer.0.output.dense.weight" in names
    assert "vit.encoder.layer.0.layernorm_before.weight" in names
    assert {"vit.embeddings.cls_token", "vit.layernorm.weight", "classifier.bias"} <= names
    assert not any("layers." in name or "mlp" in name or "_proj" in name for name in names)


def test_base_with_14_labels_has_85809422_parameters():
    model = build("vit-base", image_size=224, layers=(3, 3, 3, 3))
    assert sum(parameter.numel() for parameter in model.parameters()) == 85_809_422


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"),
    [("vit-micro", 96, 4, 3), ("vit-tiny", 192, 12, 3), ("vit-small", 384, 12, 6)],
)
def test_sizes_are_those_of_the_literature(name, width, depth, heads):
    config = build(name, layers=(depth,), patch_size=16).config
    assert (config.hidden_size, config.num_hidden_layers) == (width, depth)
    assert (config.num_attention_heads, config.intermediate_size) == (heads, 4 * width)


def test_problem_type_and_labels_are_set():
    config = build("vit-micro", layers=(4,), patch_size=8).config
    assert config.problem_type == "multi_label_classification"
    assert [config.id2label[index] for index in range(14)] == list(FINDINGS)


def test_prior_bias_starts_near_the_entropy_of_the_labels():
    prevalence = np.array(NIH_POSITIVES) / NIH_TRAINING_IMAGES
    model = build_vit(
        ModelSection(name="vit-micro", patch_size=8, head_bias="prior"),
        names=FINDINGS,
        image_size=32,
        layers_per_stage=[4],
        seed=0,
        prevalence=prevalence,
    )
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images).logits
    # The mean loss over the training images follows from the counts; no labels are needed.
    expected = torch.tensor(prevalence, dtype=torch.float32)
    loss = multi_label_loss(logits, expected.expand(64, -1))
    assert 0.1637 < float(loss) < 0.1637 + 0.01


@pytest.mark.parametrize("source", ["size", "folder"])
def test_prior_changes_the_bias_alone(source, trunk):
    name, layers, settings = trunk, (1, 1), {}
    if source == "size":
        name, layers, settings = "vit-micro", (4,), {"patch_size": 8}
    prior = build(name, layers=layers, prevalence=0.1, head_bias="prior", **settings).classifier
    zero = build(name, layers=layers, prevalence=0.1, head_bias="zero", **settings).classifier
    assert torch.equal(prior.weight, zero.weight)
    assert torch.allclose(prior.bias, torch.full((14,), float(np.log(0.1 / 0.9))))
    assert torch.count_nonzero(zero.bias) == 0


def test_zero_bias_starts_near_log_2():
    model = build("vit-micro", layers=(4,), patch_size=8, head_bias="zero")
    assert torch.count_nonzero(model.classifier.bias) == 0
    # With only two random images the loss can deviate by 0.8.
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images).logits
    loss = multi_label_loss(logits, torch.full((64, 14), 0.05))
    assert float(loss) == pytest.approx(0.693, abs=0.05)


def test_same_seed_gives_the_same_random_weights():
    first, second = (build("vit-micro", layers=(4,), patch_size=8) for _ in range(2))
    for (name, one), other in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(one, other), name


def test_building_leaves_the_global_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build("vit-micro", layers=(4,), patch_size=8)
    assert torch.equal(torch.rand(3), expected)


def test_trunk_with_a_pooler_gets_a_new_head(trunk):
    model = build(trunk)
    weights = load_file(str(trunk / "model.safetensors"))
    loaded = {hub_name(name): value for name, value in model.state_dict().items()}
    assert torch.equal(
        loaded["vit.encoder.layer.1.output.dense.weight"],
        weights["encoder.layer.1.output.dense.weight"],
    )
    assert model.classifier.out_features == 14


def test_missing_weights_are_listed(trunk):
    edit_weights(trunk, lambda weights: weights.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(
        ModelError, match=r"1 missing: (vit\.)?encoder\.layer\.1\.output\.dense\.weight"
    ):
        build(trunk)


def test_unexpected_weights_are_listed(trunk):
    edit_weights(trunk, lambda weights: weights.update({"adapter.weight": torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"1 unexpected: .*adapter\.weight"):
        build(trunk)


def test_weights_of_another_shape_are_listed(trunk):
    edit_weights(trunk, lambda weights: weights.update({"layernorm.weight": torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"of another shape: (vit\.)?layernorm\.weight"):
        build(trunk)


def test_another_depth_names_both_numbers(trunk):
    with pytest.raises(ModelError, match=r"places 3 layers; the model has 2"):
        build(trunk, layers=(1, 2))


def test_another_architecture_is_refused(trunk):
    config = json.loads((trunk / "config.json").read_text())
    (trunk / "config.json").write_text(json.dumps({**config, "model_type": "swin"}))
    with pytest.raises(ModelError, match="'swin' model"):
        build(trunk)


@pytest.mark.parametrize("name", ["nobody/vit-nowhere", "/no/such/folder"])
def test_missing_source_names_the_alternatives(name):
    with pytest.raises(ModelError, match=r"cannot load model\.name=.*vit-tiny"):
        build(name)


def test_pickled_weights_are_not_loaded(trunk):
    (trunk / "model.safetensors").unlink()
    torch.save({}, str(trunk / "pytorch_model.bin"))
    with pytest.raises(ModelError, match="cannot load"):
        build(trunk)


def test_trained_head_of_the_same_labels_is_kept(tmp_path):
    names = {"id2label": dict(enumerate(FINDINGS)), "label2id": {}}
    trained = ViTForImageClassification(ViTConfig(**TINY, **names))
    torch.nn.init.normal_(trained.classifier.bias)
    trained.save_pretrained(tmp_path)
    model = build(tmp_path)
    assert torch.equal(model.classifier.bias, trained.classifier.bias)


def test_head_of_other_labels_is_replaced(tmp_path, caplog):
    other = {"id2label": dict(enumerate(reversed(FINDINGS))), "label2id": {}}
    ViTForImageClassification(ViTConfig(**TINY, **other)).save_pretrained(tmp_path)
    model = build(tmp_path, prevalence=0.1)
    assert "its head is replaced" in caplog.text
    assert torch.allclose(model.classifier.bias, torch.full((14,), float(np.log(0.1 / 0.9))))


def test_replaced_head_starts_like_hugging_faces(tmp_path):
    other = {"id2label": dict(enumerate(reversed(FINDINGS))), "label2id": {}}
    ViTForImageClassification(ViTConfig(**TINY, **other)).save_pretrained(tmp_path)
    head = build(tmp_path, head_bias="zero").classifier
    assert torch.count_nonzero(head.bias) == 0
    assert float(head.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_damaged_weights_are_reported(trunk):
    path = trunk / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot load"):
        build(trunk)


def test_new_head_without_a_prevalence_has_no_bias(trunk):
    micro = build("vit-micro", layers=(4,), prevalence=None, patch_size=8)
    for model in (build(trunk, prevalence=None), micro):
        assert torch.count_nonzero(model.classifier.bias) == 0
        std = float(model.classifier.weight.detach().std())
        assert std == pytest.approx(model.config.initializer_range, rel=0.2)


def save_trained(folder, names=FINDINGS, **weights):
    """Save a model with a trained head, and with further weights."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {}, "num_labels": len(names)}
    ViTForImageClassification(ViTConfig(**TINY, **labels)).save_pretrained(folder)
    edit_weights(folder, lambda saved: saved.update(weights))


def test_head_of_other_modules_is_replaced(tmp_path):
    # As a subclass saves it that makes the head a sequence of two linear layers.
    save_trained(
        tmp_path,
        **{"classifier.0.weight": torch.ones(24, 24), "classifier.0.bias": torch.ones(24)},
        **{"classifier.2.weight": torch.ones(14, 24), "classifier.2.bias": torch.ones(14)},
    )
    edit_weights(
        tmp_path, lambda saved: [saved.pop(f"classifier.{key}") for key in ("weight", "bias")]
    )
    head = build(tmp_path, head_bias="zero").classifier
    assert head.weight.shape == (14, 24)
    assert torch.count_nonzero(head.bias) == 0
    assert float(head.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_linear_head_with_further_modules_is_replaced(tmp_path):
    save_trained(
        tmp_path,
        **{"classifier.bias": torch.ones(14), "classifier.norm.weight": torch.ones(24)},
    )
    assert torch.count_nonzero(build(tmp_path, head_bias="zero").classifier.bias) == 0


# The check by config.json alone


def check(name, *, image_size=32, layers=(1, 1)):
    return check_source(
        ModelSection(name=str(name)), image_size=image_size, layers_per_stage=layers
    )


def test_source_of_a_trained_head_has_its_labels(tmp_path):
    save_trained(tmp_path, ["second", "first"])
    assert check(tmp_path) == ["second", "first"]


def test_source_without_named_labels_has_none(tmp_path, trunk):
    save_trained(tmp_path, ["LABEL_0", "LABEL_1"])
    assert check(tmp_path) is None
    assert check(trunk) is None
    assert check("vit-tiny", image_size=224, layers=(12,)) is None


def test_trunk_with_named_labels_has_no_head(trunk):
    config = json.loads((trunk / "config.json").read_text())
    (trunk / "config.json").write_text(json.dumps({**config, "id2label": {"0": "cat", "1": "dog"}}))
    assert check(trunk) is None


def test_check_of_a_source_reads_no_weights(trunk):
    (trunk / "model.safetensors").write_bytes(b"")
    assert check(trunk) is None


@pytest.mark.parametrize("name", ["nobody/vit-nowhere", "/no/such/folder"])
def test_check_names_the_alternatives_of_a_missing_source(name):
    with pytest.raises(ModelError, match=r"cannot load model\.name=.*vit-tiny"):
        check(name)


def test_check_refuses_what_cannot_be_built(trunk):
    with pytest.raises(ModelError, match=r"image_size=60 is not a multiple of 8.*: 56 or 64\."):
        check(trunk, image_size=60)
    with pytest.raises(ModelError, match=r"places 3 layers; the model has 2"):
        check(trunk, layers=(1, 2))
    (trunk / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(ModelError, match="'swin' model"):
        check(trunk)
    (trunk / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot load model\.name="):
        check(trunk)


def test_activation_of_random_weights():
    def act(**settings):
        return build("vit-micro", layers=(4,), patch_size=8, **settings).config.hidden_act

    assert act() == "gelu"
    assert act(hidden_act="gelu_pytorch_tanh") == "gelu_pytorch_tanh"


def test_activation_is_that_of_the_checkpoint_unless_set(trunk):
    config = json.loads((trunk / "config.json").read_text())
    (trunk / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu_pytorch_tanh"}))
    assert build(trunk).config.hidden_act == "gelu_pytorch_tanh"
    assert build(trunk, hidden_act="gelu").config.hidden_act == "gelu"


@pytest.mark.parametrize("source", ["size", "folder"])
def test_model_for_an_ipu_records_its_activation(source, trunk, caplog):
    name, more = ("vit-micro", {"patch_size": 8}) if source == "size" else (trunk, {})
    model = build_vit(
        ModelSection(name=str(name), **more),
        names=FINDINGS,
        image_size=32,
        layers_per_stage=(4,) if source == "size" else (1, 1),
        seed=0,
        prevalence=np.full(14, 0.1),
        for_ipu=True,
    )
    assert model.config.hidden_act == "gelu_pytorch_tanh"
    assert model.config._attn_implementation == "eager"
    x = torch.linspace(-3, 3, 50)
    tanh = torch.nn.functional.gelu(x, approximate="tanh")
    activations = [m for m in model.modules() if "GELU" in type(m).__name__]
    assert activations
    for activation in activations:
        assert torch.equal(activation(x), tanh)
