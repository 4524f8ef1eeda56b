"""The sizes of ViT as the literature names them, and the shape of a model known without torch.

Tiny, small and base are those of Touvron et al. 2021 (DeiT) and Dosovitskiy et al. 2021 (ViT), who
also name large and huge; `vit-micro` is ours, for the demo and the tests.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

__all__ = ["SIZES", "Architecture", "known_architecture", "known_depth"]


class Architecture(NamedTuple):
    """Width, depth, number of attention heads and spread of random weights.

    The MLP is four times as wide, where `intermediate_size` does not say otherwise; `patch_size` is
    None where `model.patch_size` says it. A narrow model learns faster from wider weights: at a
    width of 96, 0.02 (ViT's, made for 768) leaves the first layers nearly silent.
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
    """Return the shape of `model.name`, or None where only loading tells.

    A size has its own; a local folder's stands in its config.json; a hub name such as
    ``google/vit-base-patch16-224-in21k`` says its size and its patches.
    """
    if name in SIZES:
        return SIZES[name]
    config = _local_config(name)
    if config is not None:
        return _from_local(config)
    match = re.search(r"(vit-(?:tiny|small|base|large|huge))-patch(\d+)", name)
    return SIZES[match.group(1)]._replace(patch_size=int(match.group(2))) if match else None


def known_depth(name: str) -> Optional[int]:
    """Return the number of encoder layers of `model.name`, or None where only loading tells."""
    config = _local_config(name)
    if config is not None:
        layers = config.get("num_hidden_layers")
        return layers if isinstance(layers, int) else None
    architecture = known_architecture(name)
    return None if architecture is None else architecture.num_layers


def _local_config(name: str) -> Optional[Dict[str, Any]]:
    """Read a folder's config.json; {} where it cannot be: loading the model says what is wrong."""
    file = Path(name) / "config.json"
    if name in SIZES or not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _from_local(config: Dict[str, Any]) -> Optional[Architecture]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes: List[int] = []
    for key in (*keys, "patch_size", "num_channels"):
        value = config.get(key)
        if not isinstance(value, int) or value < 1:
            return None
        sizes.append(value)
    width, depth, heads, mlp, patch, channels = sizes
    return Architecture(
        width, depth, heads, intermediate_size=mlp, patch_size=patch, num_channels=channels
    )
