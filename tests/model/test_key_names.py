"""Weights under the names of other libraries give the original's features."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from cxr_vit.config.schema import ModelSection
from cxr_vit.errors import ModelError
from cxr_vit.model.key_names import Stored, translate
from cxr_vit.model.source import open_weights, read_config
from cxr_vit.model.vit import build_vit

Weights = Dict[str, Tensor]
WIDTH, HEADS, LAYERS, PATCH, SIDE = 24, 3, 2, 8, 32
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}
VIT = {**SIZES, "intermediate_size": 2 * WIDTH}
TIMM_CONFIG = {"architecture": "vit_tiny", "num_classes": 5, "model_args": {"num_heads": HEADS}}


# timm's ViT, as its sources and facebook's compute it


class TimmAttention(nn.Module):
    def __init__(self, *, has_bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=has_bias)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(images, tokens, 3, HEADS, WIDTH // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query * (WIDTH // HEADS) ** -0.5) @ key.transpose(-2, -1)
        x = (scores.softmax(-1) @ value).transpose(1, 2).reshape(images, tokens, WIDTH)
        return self.proj(x)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self, *, has_scale: bool, has_bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn = TimmAttention(has_bias=has_bias)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(WIDTH, 2 * WIDTH))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(2 * WIDTH, WIDTH))
        self.ls1, self.ls2 = (LayerScale() if has_scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TimmViT(nn.Module):
    def __init__(self, kind: str = "vit", *, has_bias: bool = True) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.dist_token = nn.Parameter(torch.randn(1, 1, WIDTH)) if kind == "deit" else None
        extra = 2 if kind == "deit" else 1
        self.pos_embed = nn.Parameter(torch.randn(1, extra + (SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(
            TimmBlock(has_scale=kind == "dinov2", has_bias=has_bias) for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, 5)
        if kind == "deit":
            self.head_dist = nn.Linear(WIDTH, 5)
        for parameter in self.parameters():  # no bias of 0, no weight of 1
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        tokens = [self.cls_token, *([] if self.dist_token is None else [self.dist_token])]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


IMAGES = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def write(folder: Path, weights: Weights, config: Any = None, name: str = "model") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in weights.items()},
        str(folder / f"{name}.safetensors"),
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def features(place: Path) -> Tensor:
    """Return the normalised tokens of the classifier that is built of a folder or a file."""
    section = ModelSection(name=str(place))
    built = build_vit(section, names=["a"], image_size=SIDE, layers_per_stage=[1, 1], seed=0)
    with torch.no_grad():
        tokens: Tensor = getattr(built, built.config.model_type)(IMAGES).last_hidden_state
    return tokens


def original(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        output = model.eval()(IMAGES, **inputs)
    tokens: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return tokens


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2"])
def test_timm_names_give_the_features_of_timm(tmp_path: Path, kind: str) -> None:
    model = TimmViT(kind)
    place = write(tmp_path, model.state_dict(), TIMM_CONFIG)
    assert read_config(place).kind == kind
    torch.testing.assert_close(features(place), original(model), rtol=0, atol=1e-5)


def test_timm_names_without_a_bias_of_the_attention(tmp_path: Path) -> None:
    model = TimmViT(has_bias=False)
    place = write(tmp_path, model.state_dict(), TIMM_CONFIG)
    assert read_config(place).qkv_bias is False
    torch.testing.assert_close(features(place), original(model), rtol=0, atol=1e-5)


def mae(weights: Weights) -> Weights:
    decoder = {
        "mask_token": torch.ones(1, 1, 12),
        "decoder_pos_embed": torch.ones(1, 17, 12),
        "decoder_embed.weight": torch.ones(12, WIDTH),
        "decoder_blocks.0.attn.qkv.weight": torch.ones(36, 12),
        "decoder_norm.weight": torch.ones(12),
        "decoder_pred.weight": torch.ones(192, 12),
    }
    return {**{key: value for key, value in weights.items() if "head" not in key}, **decoder}


def dino(weights: Weights) -> Weights:
    """A checkpoint of DINO's teacher: trunk and projection head side by side."""
    trunk = {f"module.backbone.{key}": value for key, value in mae(weights).items()}
    return {**trunk, "module.head.mlp.0.weight": torch.ones(8, WIDTH)}


@pytest.mark.parametrize(
    ("change", "prefix"),
    [
        (mae, ""),
        (dino, "module.backbone."),
        (lambda weights: {f"model.{key}": value for key, value in weights.items()}, "model."),
        (
            lambda weights: {f"module._orig_mod.{key}": value for key, value in weights.items()},
            "module._orig_mod.",
        ),
        (lambda weights: {f"vit.{key}": value for key, value in weights.items()}, "vit."),
    ],
    ids=["MAE", "DINO", "model", "compiled", "vit"],
)
def test_prefix_of_all_names_is_dropped_and_logged_once(
    tmp_path: Path, change: Callable[[Weights], Weights], prefix: str, caplog: Any
) -> None:
    model = TimmViT()
    place = write(tmp_path, change(model.state_dict()), TIMM_CONFIG)
    with caplog.at_level(logging.INFO):
        found = features(place)
    torch.testing.assert_close(found, original(model), rtol=0, atol=1e-5)
    lines = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert lines == [f"{place}: dropped the prefix {prefix} of all names"] * bool(prefix)


def test_blocks_of_dinov2_in_chunks(tmp_path: Path) -> None:
    model = TimmViT("dinov2")
    weights = {
        key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): value
        for key, value in model.state_dict().items()
    }
    place = write(tmp_path, weights, TIMM_CONFIG)
    torch.testing.assert_close(features(place), original(model), rtol=0, atol=1e-5)


def make_mae() -> nn.Module:
    decoder = {"decoder_hidden_size": 12, "decoder_num_hidden_layers": 1}
    heads = {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 24, "mask_ratio": 0.0}
    return ViTMAEForPreTraining(ViTMAEConfig(**VIT, **decoder, **heads))


@pytest.mark.parametrize("form", ["saved", "in memory", "prefixed", "nothing but tensors"])
@pytest.mark.parametrize(
    ("make", "trunk", "kind"),
    [
        (lambda: ViTModel(ViTConfig(**VIT)), None, "vit"),
        (lambda: ViTForMaskedImageModeling(ViTConfig(**VIT, encoder_stride=8)), "vit", "vit"),
        (make_mae, "vit", "vit"),
        (lambda: DeiTModel(DeiTConfig(**VIT)), None, "deit"),
        (lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)), None, "dinov2"),
    ],
    ids=["ViT", "run_mim", "ViTMAE", "DeiT", "DINOv2"],
)
def test_hugging_face_models_give_their_own_features(
    tmp_path: Path, make: Callable[[], nn.Module], trunk: Any, kind: str, form: str
) -> None:
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    if form != "saved":
        prefix = "module.model." if form == "prefixed" else ""
        write(tmp_path, {prefix + key: value for key, value in model.state_dict().items()})
    if form == "nothing but tensors":
        (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG))
    assert read_config(tmp_path).kind == kind
    noise = {"noise": torch.arange(16.0).repeat(2, 1)} if make is make_mae else {}
    expected = original(getattr(model, trunk) if trunk else model, **noise)
    torch.testing.assert_close(features(tmp_path), expected, rtol=0, atol=1e-5)


def test_head_of_timm_is_that_of_hugging_face(tmp_path: Path) -> None:
    model = TimmViT("deit")
    with open_weights(write(tmp_path, model.state_dict(), TIMM_CONFIG)) as tensors:
        assert torch.equal(tensors["classifier.weight"].read(), model.head.weight)
        assert not [name for name in tensors if "dist" in name and "token" not in name]


def test_norm_of_the_mean_is_beside_the_trunk_whatever_the_prefix() -> None:
    names = [f"module.{name}" for name in timm_names("fc_norm.weight", "fc_norm.bias")]
    found = translate(name for name in names if not name.startswith("module.norm."))
    assert found.tensors["fc_norm.weight"] == Stored("module.fc_norm.weight")
    assert "vit.layernorm.weight" not in found.tensors


# What is no ViT


def timm_names(*more: str, without: str = "-") -> List[str]:
    return [*(name for name in TimmViT().state_dict() if not name.startswith(without)), *more]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (timm_names("reg_token"), "it has register tokens, which are not supported: reg_token"),
        (timm_names("blocks.0.mlp.w12.weight"), "SwiGLU layers are not supported"),
        (timm_names("blocks.0.attn.q_bias", "rel_pos"), "2 unexpected: blocks.0.attn.q_bias, rel"),
        (timm_names("norm_pre.weight"), "1 unexpected: norm_pre.weight"),
        (timm_names("blocks.0.attn.proj.lora_a"), "1 unexpected: blocks.0.attn.proj.lora_a"),
        (timm_names("blocks.0.7.attn.proj.weight", "blocks.7.attn.proj.weight"), "twice"),
        (["conv1.weight", "bn1.bias"], "no class token (cls_token), so it is not one ViT: bn1"),
        ([], "no class token"),
        (["blocks.0.attn.qkv.weight"], "it is not one ViT: blocks.0.attn.qkv.weight"),
        (
            [*(f"teacher.{n}" for n in timm_names()), *(f"student.{n}" for n in timm_names())],
            "2 class tokens, so it is not one ViT: teacher.cls_token, student.cls_token",
        ),
    ],
)
def test_names_of_another_model_are_refused_with_the_first(names: List[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        translate(names)
    assert "\n" not in str(caught.value)


def test_timm_folder_of_no_vit_is_refused_in_one_line(tmp_path: Path) -> None:
    config = {"architecture": "vit_base_patch16_224", "num_classes": 1000, "pretrained_cfg": {}}
    weights = {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}
    with pytest.raises(ModelError, match=r"cannot load .*not one ViT: blocks\.0\.attn") as caught:
        features(write(tmp_path, weights, config))
    assert "\n" not in str(caught.value)


# The shape, from the tensors


def changed(**tensors: Tensor) -> Weights:
    return {**TimmViT().state_dict(), **{k.replace("__", "."): v for k, v in tensors.items()}}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (changed(cls_token=torch.ones(24)), "cls_token has the shape [24], not 3 dimensions"),
        (changed(pos_embed=torch.ones(1, 16, 24)), "its 16 position embeddings are not those of"),
        (changed(pos_embed=torch.ones(1, 1, 24)), "its 1 position embeddings are not those of"),
        (changed(patch_embed__proj__weight=torch.ones(24, 3, 8, 4)), "its patches are no squares"),
        (changed(patch_embed__proj__weight=torch.ones(24, 3, 8, 0)), "its patches are no squares"),
        (changed(cls_token=torch.ones(1, 1, 0)), "its patches are no squares"),
        (changed(blocks__0__attn__qkv__weight=torch.ones(71, 24)), "no rows of query, key and"),
        (changed(blocks__0__attn__qkv__bias=torch.ones(())), "no rows of query, key and value"),
        (changed(blocks__999__norm1__weight=torch.ones(24)), "num_hidden_layers=1000"),
        (changed(patch_embed__proj__weight=torch.ones(24, 99, 8, 8)), "num_channels=99"),
    ],
)
def test_shapes_of_no_vit_are_refused(tmp_path: Path, weights: Weights, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_config(write(tmp_path, weights, TIMM_CONFIG))
    assert "\n" not in str(caught.value)


def wide(width: int) -> Weights:
    """Tensors of a width, whose other sides are small."""
    tensors = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "patch_embed.proj.weight": (width, 1, 2, 2),
        "blocks.0.mlp.fc1.weight": (2, width),
        "norm.weight": (width,),
    }
    return {name: torch.zeros(shape) for name, shape in tensors.items()}


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1280, 16), (1408, 16), (512, 8)]
)
def test_heads_follow_from_the_width(tmp_path: Path, width: int, heads: int) -> None:
    saved = read_config(write(tmp_path, wide(width)))
    assert (saved.num_attention_heads, saved.image_size, saved.patch_size) == (heads, (4, 4), 2)
    assert saved.layer_norm_eps == 1e-6


def test_unknown_number_of_heads_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'the width 100 is unknown: .*"num_heads"'):
        read_config(write(tmp_path, wide(100)))


def test_size_of_timm_gives_the_patches_of_a_rectangle(tmp_path: Path) -> None:
    config = {**TIMM_CONFIG, "model_args": {"num_heads": HEADS, "img_size": [16, 64]}}
    weights = TimmViT().state_dict()
    assert read_config(write(tmp_path, weights, config)).grid == (2, 8)
    config = {**TIMM_CONFIG, "pretrained_cfg": {"input_size": [3, 64, 16]}}
    assert read_config(write(tmp_path, weights, config)).grid == (8, 2)
    config = {**TIMM_CONFIG, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    assert read_config(write(tmp_path, weights, config)).grid == (4, 4)


def test_shape_from_the_tensors_is_logged_when_they_are_loaded(tmp_path: Path, caplog: Any) -> None:
    place = write(tmp_path, TimmViT("dinov2").state_dict(), TIMM_CONFIG)
    with caplog.at_level(logging.INFO):
        features(place)
    line = caplog.records[0].getMessage()
    assert line == (
        f"{place}: from the tensors: a dinov2 of 2 layers, width 24, 3 heads, patches of 8 and"
        " images of 32 x 32 pixels, layer_norm_eps=1e-06"
    )
