"""The sizes of ViT as the literature names them, and the depth of a model known without torch.

Tiny, small and base are those of Touvron et al. 2021 (DeiT) and Dosovitskiy et al. 2021 (ViT);
`vit-micro` is ours, for the demo and the tests.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Dict, NamedTuple, Optional

__all__ = ["SIZES", "Architecture", "known_depth"]


class Architecture(NamedTuple):
    """Width, depth, number of attention heads and spread of random weights.

    The MLP is four times as wide. A narrow model learns faster from wider weights: at a width of
    96, 0.02 (ViT's, made for 768) leaves the first layers nearly silent.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    initializer_range: float = 0.02


SIZES: Dict[str, Architecture] = {
    "vit-micro": Architecture(96, 4, 3, 0.05),
    "vit-tiny": Architecture(192, 12, 3),
    "vit-small": Architecture(384, 12, 6),
    "vit-base": Architecture(768, 12, 12),
}

_HUB_DEPTHS = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32}


def known_depth(name: str) -> Optional[int]:
    """Return the number of encoder layers of `model.name`, or None where only loading tells.

    A size has its own; a local folder's stands in its config.json; a hub name such as
    ``google/vit-base-patch16-224-in21k`` says its size.
    """
    if name in SIZES:
        return SIZES[name].num_layers
    config_file = Path(name) / "config.json"
    if config_file.is_file():
        try:
            layers = json.loads(config_file.read_text(encoding="utf-8")).get("num_hidden_layers")
        except (ValueError, AttributeError):
            return None  # loading the model says what is wrong with the file
        return layers if isinstance(layers, int) else None
    match = re.search(r"vit-(tiny|small|base|large|huge)-patch", name)
    return _HUB_DEPTHS[match.group(1)] if match else None
