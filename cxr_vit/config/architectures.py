"""Sizes of ViT from the literature, and the shape of a model without loading it.

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


class Architecture(NamedTuple):
    """Shape of a ViT and the standard deviation of its random weights.

    `intermediate_size` None means an MLP four times as wide as the model; `patch_size` None means
    `model.patch_size`. A narrow model learns faster from wider weights: at a width of 96, ViT's
    0.02 (made for 768) leaves the first layers nearly silent.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    initializer_range: float = 0.02
    intermediate_size: Optional[int] = None
    patch_size: Optional[int] = None
    num_channels: int = 3

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

    It comes from `SIZES`, from the config.json of a local folder, or from the size and the patches
    in a hub name such as ``google/vit-base-patch16-224-in21k``.
    """
    if name in SIZES:
        return SIZES[name]
    config = _local_config(name)
    if config is not None:
        return _from_local(config)
    match = re.search(r"(vit-(?:tiny|small|base|large|huge))-patch(\d+)", name)
    return SIZES[match.group(1)]._replace(patch_size=int(match.group(2))) if match else None


def known_depth(name: str) -> Optional[int]:
    """Return the number of encoder layers of `model.name`, or None if known only after loading."""
    config = _local_config(name)
    if config is not None:
        layers = config.get("num_hidden_layers")
        return layers if isinstance(layers, int) else None
    architecture = known_architecture(name)
    return None if architecture is None else architecture.num_layers


def _local_config(name: str) -> Optional[Dict[str, Any]]:
    """Read a folder's config.json; {} if it is invalid, which loading the model then reports."""
    file = Path(name) / "config.json"
    if name in SIZES or not file.is_file():
        return None
    try:
        return read_json(file, limit=CONFIG_LIMIT)
    except (OSError, ValueError):
        return {}


def _from_local(config: Dict[str, Any]) -> Optional[Architecture]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes: List[Any] = [config.get(key) for key in (*keys, "patch_size", "num_channels")]
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        return None
    width, depth, heads, *others = sizes
    return Architecture(width, depth, heads, Architecture(1, 1, 1).initializer_range, *others)
