"""Random models of every kind, in folders as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

import pytest
import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from cxr_vit.data.labels import FINDINGS
from cxr_vit.model.vit import VitParts

#: Kind -> config, trunk, classifier, settings of its own.
FAMILIES: Dict[str, Tuple[Any, Any, Any, Dict[str, Any]]] = {
    "vit": (ViTConfig, ViTModel, ViTForImageClassification, {"intermediate_size": 48}),
    "deit": (DeiTConfig, DeiTModel, DeiTForImageClassification, {"intermediate_size": 48}),
    "dinov2": (Dinov2Config, Dinov2Model, Dinov2ForImageClassification, {"mlp_ratio": 2}),
}


def make(kind: str, *, head: bool = True, names: Sequence[str] = FINDINGS, **settings: Any) -> Any:
    """Return a random model of two layers, with all parameters far from their initial values."""
    config, trunk, classifier, own = FAMILIES[kind]
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = config(**{**shape, "patch_size": 8, **labels, **own, **settings})
        model = (classifier if head else trunk)(built).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model


def save(kind: str, folder: Path, **settings: Any) -> Any:
    """Save a model of `make` and return it."""
    model = make(kind, **settings)
    model.save_pretrained(str(folder))
    return model


def needs_current(kind: str) -> Any:
    """Return a mark that skips where transformers has older layers, which compute every token."""
    layer = VitParts(make(kind)).layers[-1][1]
    is_current = hasattr(layer.attention, "q_proj")
    return pytest.mark.skipif(not is_current, reason=f"needs a newer transformers for {kind}")


CURRENT = [pytest.param(kind, marks=needs_current(kind)) for kind in FAMILIES]


def images(size: int, count: int = 3) -> Tensor:
    """Return random uint8 images."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 256, (count, 1, size, size), generator=generator)
    return drawn.to(torch.uint8)


def pixels(of: Tensor) -> Tensor:
    """Return the input of transformers' models, for a mean and a standard deviation of 0.5."""
    return ((of.float() / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1)


def outputs(model: Any, of: Tensor) -> Any:
    """Return what transformers computes, with positions interpolated for the images."""
    # DINOv2 has no such argument; it always interpolates.
    resize = {} if model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        return model(pixels(of), **resize)
