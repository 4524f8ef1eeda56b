"""Parameter groups and optimizers."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Tuple

import torch
from torch import nn

from cxr_vit.config.schema import OptimSection

__all__ = ["build_adamw", "is_decayed", "parameter_groups"]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay should touch a parameter: matrices, yes; the rest, no.

    Biases and norms are vectors; the class token and the position embeddings are neither weights
    of a layer nor vectors, and are told by their hub names.
    """
    return parameter.dim() > 1 and not name.endswith(("cls_token", "position_embeddings"))


def parameter_groups(
    parameters: Iterable[Tuple[str, nn.Parameter]], optim: OptimSection
) -> List[Dict[str, Any]]:
    """Split parameters (hub name, parameter) into those decayed and those not.

    Groups without a parameter are left out.
    """
    decayed: List[nn.Parameter] = []
    kept: List[nn.Parameter] = []
    for name, parameter in parameters:
        (decayed if optim.decay_all or is_decayed(name, parameter) else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(
    parameters: Iterable[Tuple[str, nn.Parameter]], optim: OptimSection
) -> torch.optim.AdamW:
    """Make torch's AdamW (Loshchilov and Hutter, 2019) with this project's groups."""
    return torch.optim.AdamW(
        parameter_groups(parameters, optim),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
