"""Names of the tensors of a Vision Transformer, in the libraries that write them.

Hugging Face's hub has the names of transformers 4.x, e.g. `vit.encoder.layer.0.output.dense.bias`.
These "hub names" are used for everything that this project stores or logs. Others are translated:
those of transformers 5.x in memory, and timm's, which are also those of facebook's MAE, DeiT, DINO
and DINOv2. A trunk (`vit.`, `deit.`, `dinov2.`) and one prefix of all names may be there or not.
"""

from __future__ import annotations

import re
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from cxr_vit.config.architectures import KINDS

_Renames = Tuple[Tuple[str, str], ...]
#: Parameter names of transformers 5.x -> hub names.
_RENAMES: _Renames = (
    (r"^(vit|deit)\.layers\.(\d+)\.", r"\1.encoder.layer.\2."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"^((?:vit|deit)\..*)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^((?:vit|deit)\..*)\.mlp\.fc2\.", r"\1.output.dense."),
)
#: timm's names -> names of a trunk. DINOv2's training divides its blocks into chunks: blocks.0.7.
_TIMM: _Renames = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^dist_token$", "embeddings.distillation_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(?:\d+\.)?(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"^norm\.", "layernorm."),
)
#: What dinov2 calls as timm does.
_TIMM_VIT: _Renames = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
_FUSED = ".attn.qkv."
_PARTS = tuple(f".attention.attention.{part}." for part in ("query", "key", "value"))

_EMBEDDINGS = "embeddings."
_CLASS_TOKEN = re.compile(r"(|.*\.)cls_token$")
#: What precedes the class token where nothing else precedes the trunk's names.
_TRUNK_TOKEN = re.compile(rf"(({'|'.join(KINDS)})\.)?{re.escape(_EMBEDDINGS)}")
_HEAD = re.compile(r"^(head|classifier|cls_classifier)\.")
#: The norm of the mean of the patches, which is beside the trunk as the head is.
_MEAN_NORM = re.compile(r"^fc_norm\.(weight|bias)$")
#: Of pretraining and of distillation; no classifier on the class token needs them.
_UNUSED = re.compile(
    r"^((.*\.)?mask_token$|decoder[._]|pooler\.|pre_logits\.|head_dist\.|distillation_classifier\."
    r"|(dino|ibot)_head\.|head\.(mlp|last_layer)\.)"
)
_PARAMETER = re.compile(
    r"(embeddings\.(cls_token|distillation_token|position_embeddings)"
    r"|embeddings\.patch_embeddings\.projection\.(weight|bias)|layernorm\.(weight|bias)"
    r"|encoder\.layer\.\d+\.(layer_scale[12]\.lambda1"
    r"|(attention\.(attention\.(query|key|value)|output\.dense)|(intermediate|output)\.dense"
    r"|mlp\.fc[12]|layernorm_(before|after)|norm[12])\.(weight|bias)))"
)
#: Parts of a name that say why a model is not supported.
_REASONS = (
    (r"(register_tokens|reg_token)$", "it has register tokens, which are not supported"),
    (r"\.mlp\.(w12|w3|weights_in|weights_out|gate_proj)\.", "SwiGLU layers are not supported"),
)


def hub_name(name: str) -> str:
    """Return the hub name of a parameter of either version of transformers."""
    return _renamed(name, _RENAMES)


class Stored(NamedTuple):
    """Where a tensor is stored: under a name, as a whole or as a third of its rows."""

    name: str
    third: Optional[int] = None


class KeyNames(NamedTuple):
    """The tensors of a classifier by hub name."""

    kind: str
    tensors: Dict[str, Stored]
    #: What all names begin with, and was dropped.
    prefix: str
    is_timm: bool


def translate(names: Iterable[str], kind: Optional[str] = None) -> KeyNames:
    """Find the tensors of a classifier among stored ones; without a kind, their names give it.

    Raises ValueError with the reason if they are not those of one Vision Transformer.
    """
    given = list(names)
    *prefix, trunk = _prefixes(given)
    is_timm = not trunk.endswith(_EMBEDDINGS)
    trunk = trunk if is_timm else trunk[: -len(_EMBEDDINGS)]
    local = {name: _without(name, [*prefix, trunk]) for name in given}
    local = {name: rest for name, rest in local.items() if not _UNUSED.match(rest)}
    kind = kind or _kind_of(local.values())
    tensors: Dict[str, Stored] = {}
    unknown: List[str] = []
    for name, rest in local.items():
        for full, third in _full_names(rest, kind, is_timm):
            if full in tensors:
                raise ValueError(f"it has the weights {full} twice.")
            tensors[full] = Stored(name, third)
            is_head = _HEAD.match(full) or _MEAN_NORM.match(full)
            if not is_head and not _PARAMETER.fullmatch(full.partition(".")[2]):
                unknown.append(name)
    if unknown:
        raise ValueError(_refusal(unknown, local))
    dropped = [*prefix, *([] if trunk[:-1] in KINDS else [trunk])]
    return KeyNames(kind, tensors, "".join(dropped), is_timm)


def _prefixes(names: List[str]) -> List[str]:
    """Return what the names begin with, part by part; last, what those of the class token do.

    The parts are those of all names, but of a pretraining head that no classifier needs.
    """
    tokens = [match for match in map(_CLASS_TOKEN.match, names) if match]
    if len(tokens) != 1:
        what = f"{len(tokens)} class tokens" if tokens else "no class token (cls_token)"
        shown = [match.group() for match in tokens] or sorted(names)
        raise ValueError(f"its tensors have {what}, so it is not one ViT: {_first(shown)}.")
    rest = tokens[0].group(1)
    rests, parts = names, []
    while rest and not _TRUNK_TOKEN.fullmatch(rest):
        part = rest[: rest.index(".") + 1]
        if not all(name.startswith(part) or _UNUSED.match(name) for name in rests):
            break
        parts.append(part)
        rest = rest[len(part) :]
        rests = [_without(name, [part]) for name in rests]
    return [*parts, rest]


def _without(name: str, parts: Sequence[str]) -> str:
    for part in parts:
        if name.startswith(part):
            name = name[len(part) :]
    return name


def _kind_of(names: Iterable[str]) -> str:
    text = "\n".join(names)
    if re.search(r"\.(ls1\.gamma|layer_scale1\.lambda1)$", text, re.MULTILINE):
        return "dinov2"
    return "deit" if re.search(r"(dist|distillation)_token$", text, re.MULTILINE) else "vit"


def _full_names(name: str, kind: str, is_timm: bool) -> List[Tuple[str, Optional[int]]]:
    """Return the hub names of a tensor, with the third of its rows that each has."""
    if _HEAD.match(name):
        return [(_HEAD.sub("classifier.", name), None)]
    if _MEAN_NORM.match(name):
        return [(name, None)]
    if not is_timm:
        return [(hub_name(f"{kind}.{name}"), None)]
    name = _renamed(name, _TIMM if kind == "dinov2" else _TIMM + _TIMM_VIT)
    full = hub_name(f"{kind}.{name}")
    if _FUSED not in full:
        return [(full, None)]
    return [(full.replace(_FUSED, part), index) for index, part in enumerate(_PARTS)]


def _refusal(unknown: List[str], local: Mapping[str, str]) -> str:
    for pattern, reason in _REASONS:
        keys = [name for name in unknown if re.search(pattern, local[name])]
        if keys:
            return f"{reason}: {_first(keys)}."
    return f"no {', '.join(KINDS)} has these, {len(unknown)} unexpected: {_first(unknown)}."


def _renamed(name: str, renames: _Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _first(names: List[str], count: int = 5) -> str:
    return f"{', '.join(names[:count])}{', ...' if len(names) > count else ''}"


def config_of(
    shapes: Mapping[str, Tuple[int, ...]], kind: str, image_size: Optional[Sequence[int]] = None
) -> Dict[str, Any]:
    """Return the keys of config.json that the shapes of the tensors, by hub name, determine.

    The patches are those of `image_size` (rows, columns, pixels) if that fits the position
    embeddings, else of a square. Raises ValueError with the reason if the shapes are not those of a
    ViT.
    """
    token = _shape(shapes, f"{kind}.embeddings.cls_token", 3)
    projection = _shape(shapes, f"{kind}.embeddings.patch_embeddings.projection.weight", 4)
    positions = _shape(shapes, f"{kind}.embeddings.position_embeddings", 3)[1]
    layer = f"{kind}.encoder.layer."
    first = f"{layer}0." + ("mlp.fc1.weight" if kind == "dinov2" else "intermediate.dense.weight")
    width, patch = token[2], projection[2]
    mlp = _shape(shapes, first, 2)[0]
    if not (width and patch and patch == projection[3]):
        raise ValueError(f"its patches are no squares: a projection of {list(projection)}.")
    patches = positions - KINDS[kind].extra_tokens
    rows = columns = round(max(patches, 0) ** 0.5)
    if image_size and len(image_size) == 2:
        given = image_size[0] // patch, image_size[1] // patch
        rows, columns = given if given[0] * given[1] == patches else (rows, columns)
    if patches < 1 or rows * columns != patches:
        raise ValueError(
            f"its {positions} position embeddings are not those of a square and the class token."
        )
    depths = [
        int(name[len(layer) :].partition(".")[0]) for name in shapes if name.startswith(layer)
    ]
    head = shapes.get("classifier.weight")
    return {
        "hidden_size": width,
        "num_hidden_layers": max(depths) + 1,
        **({"mlp_ratio": mlp / width} if kind == "dinov2" else {"intermediate_size": mlp}),
        "num_channels": projection[1],
        "patch_size": patch,
        "image_size": [rows * patch, columns * patch],
        "qkv_bias": f"{layer}0.attention.attention.query.bias" in shapes,
        "num_labels": head[0] if head else 0,
    }


def _shape(shapes: Mapping[str, Tuple[int, ...]], name: str, dimensions: int) -> Tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"it is no ViT: {name} is missing.")
    if len(shapes[name]) != dimensions:
        raise ValueError(f"{name} has the shape {list(shapes[name])}, not {dimensions} dimensions.")
    return shapes[name]
