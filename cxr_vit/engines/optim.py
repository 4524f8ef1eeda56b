"""Parameter groups and optimizers."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Tuple

import torch
from torch import nn

from cxr_vit.config.schema import OptimSection
from cxr_vit.errors import ConfigError

__all__ = ["build_optimizer", "is_decayed", "parameter_groups"]


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


def build_optimizer(
    parameters: Iterable[Tuple[str, nn.Parameter]], optim: OptimSection
) -> torch.optim.Optimizer:
    """Make torch's AdamW (Loshchilov and Hutter, 2019) or SGD with this project's groups.

    Raises
    ------
    ConfigError
        If torch has no such optimizer.
    """
    groups = parameter_groups(parameters, optim)
    if optim.name == "adamw":
        betas = (optim.beta1, optim.beta2)
        return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    raise ConfigError(
        f"optim.name={optim.name} is PopTorch's own; torch has adamw and sgd. Set"
        " optim.name, or engine.name=poptorch on a machine with IPUs."
    )
