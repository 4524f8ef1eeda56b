"""Kinds and sizes of models from the literature, and the shape of a model without loading it.

Tiny, small and base are from Touvron et al. 2021 (DeiT); base, large and huge from Dosovitskiy et
al. 2021 (ViT); `vit-micro` is our own, for the demo and the tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from cxr_vit.regular_files import read_json

#: Size limit of a config.json, bytes; 22,000 labels take 2 MB.
CONFIG_LIMIT = 4 << 20


#: Hugging Face's defaults for keys that a config.json does not have.
_DEFAULTS = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3},
    **{"patch_size": 16, "intermediate_size": 3072, "mlp_ratio": 4},
}


class Kind(NamedTuple):
    """How the shape of a kind of model differs from that of a ViT.

    `extra_tokens` are no patches: the class token, and DeiT's distillation token. `pooling` is that
    of Hugging Face's classifier, one of `POOLINGS`. `layer_scale` is a factor per channel on the
    output of attention and of the MLP.
    """

    extra_tokens: int = 1
    pooling: str = "class"
    layer_scale: bool = False


#: `model_type` of config.json -> kind.
KINDS: Dict[str, Kind] = {
    "vit": Kind(),
    "deit": Kind(extra_tokens=2),
    "dinov2": Kind(pooling="both", layer_scale=True),
}

#: `model.pooling` -> vectors of the model's width that the head takes.
POOLINGS = {"class": 1, "mean": 1, "both": 2}


class Architecture(NamedTuple):
    """Shape of a model and the standard deviation of its random weights.

    `kind` is a key of `KINDS`; `pooling` None means that of the kind. `intermediate_size` None
    means an MLP four times as wide as the model; `patch_size` None means `model.patch_size`. A
    narrow model learns faster from wider weights: at a width of 96, ViT's 0.02 (made for 768)
    leaves the first layers nearly silent.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    initializer_range: float = 0.02
    intermediate_size: Optional[int] = None
    patch_size: Optional[int] = None
    num_channels: int = 3
    kind: str = "vit"
    qkv_bias: bool = True
    pooling: Optional[str] = None

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.intermediate_size or 4 * self.hidden_size


SIZES: Dict[str, Architecture] = {
    "vit-micro": Architecture(96, 4, 3, 0.05),
    "vit-tiny": Architecture(192, 12, 3),
    "vit-small": Architecture(384, 12, 6),
    "vit-base": Architecture(768, 12, 12),
    "vit-large": Architecture(1024, 24, 16),
    "vit-huge": Architecture(1280, 32, 16),
}


def known_architecture(name: str) -> Optional[Architecture]:
    """Return the shape of `model.name`, or None if it is known only after loading.

    It comes from `SIZES`, from the config.json of a local folder, or from a hub name such as
    ``google/vit-base-patch16-224-in21k``, ``timm/vit_base_patch16_224.augreg_in21k`` or
    ``facebook/dinov2-base``.
    """
    if name in SIZES:
        return SIZES[name]
    config = _local_config(name)
    if config is not None:
        return _from_local(config)
    match = re.search(
        r"(?:vit|deit)[-_](tiny|small|base|large|huge)([-_]distilled)?[-_]patch(\d+)(?!\d|_\w*dino)"
        r"|(?:^|/)(?:dinov2-(small|base|large)|rad-dino|vit-mae-(base|large|huge))$",
        name,
    )
    if match is None:
        return None
    size, distilled, patch, dino, mae = match.groups()
    if mae is not None:
        return SIZES[f"vit-{mae}"]._replace(patch_size=14 if mae == "huge" else 16)
    if patch is None:  # DINOv2's, and RAD-DINO, which is a base
        return SIZES[f"vit-{dino or 'base'}"]._replace(patch_size=14, kind="dinov2")
    kind = "deit" if distilled else "vit"  # DeiT without the token is saved as a ViT
    return SIZES[f"vit-{size}"]._replace(patch_size=int(patch), kind=kind)


def known_depth(name: str) -> Optional[int]:
    """Return the number of encoder layers of `model.name`, or None if known only after loading."""
    config = _local_config(name)
    if config is not None:
        layers = config.get("num_hidden_layers")
        return layers if isinstance(layers, int) else None
    architecture = known_architecture(name)
    return None if architecture is None else architecture.num_layers


def _local_config(name: str) -> Optional[Dict[str, Any]]:
    """Read the config.json of a folder, or beside a file; None if the name is of neither.

    Returns {} if there is none, or if it is invalid, which loading the model then reports.
    """
    place = Path(name)
    if name in SIZES or not place.exists():
        return None
    file = (place if place.is_dir() else place.parent) / "config.json"
    try:
        config = read_json(file, limit=CONFIG_LIMIT)
    except (OSError, ValueError):
        return {}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in (*KINDS, "vit_mae"):
        return config
    return {**_DEFAULTS, **({"patch_size": 14} if kind == "dinov2" else {}), **config}


def _from_local(config: Dict[str, Any]) -> Optional[Architecture]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    sizes: List[Any] = [config.get(key) for key in keys]
    patch, mlp, ratio = (config.get(k) for k in ("patch_size", "intermediate_size", "mlp_ratio"))
    if isinstance(patch, list) and patch == patch[:1] * 2:  # a square
        patch = patch[0]
    kind = config.get("model_type", "vit")
    if kind == "dinov2" and isinstance(ratio, (int, float)) and isinstance(sizes[0], int):
        mlp = int(sizes[0] * min(ratio, 1e6))
    if not all(isinstance(size, int) and size >= 1 for size in (*sizes, patch, mlp)):
        return None
    width, depth, heads, channels = sizes
    pooling = config.get("pooling")
    return Architecture(
        width,
        depth,
        heads,
        intermediate_size=mlp,
        patch_size=patch,
        num_channels=channels,
        kind=kind if isinstance(kind, str) and kind in KINDS else "vit",
        qkv_bias=config.get("qkv_bias") is not False,
        pooling=pooling if isinstance(pooling, str) and pooling in POOLINGS else None,
    )
