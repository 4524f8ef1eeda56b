"""Parameter groups and torch's optimizers."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Tuple

import torch
from torch import nn

from cxr_vit.config.schema import OptimSection
from cxr_vit.errors import ConfigError


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: to the matrices of the layers only.

    Biases, norms and LayerScale are vectors. Tokens and position embeddings have more dimensions,
    but are no weights of a layer; they are recognised by their hub names.
    """
    return parameter.dim() > 1 and not name.endswith(("_token", "position_embeddings"))


def parameter_groups(
    parameters: Iterable[Tuple[str, nn.Parameter]], optim: OptimSection
) -> List[Dict[str, Any]]:
    """Split (hub name, parameter) pairs into non-empty groups with and without weight decay."""
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
    groups: List[Dict[str, Any]], optim: OptimSection, *, lr: float
) -> torch.optim.Optimizer:
    """Build torch's AdamW (Loshchilov and Hutter, 2019) or SGD.

    `groups` is empty in a process of the pipeline engine whose stages are all frozen.

    Raises
    ------
    ConfigError
        If torch has no such optimizer.
    """
    groups = groups or [{"params": []}]  # torch refuses an empty list, not an empty group
    if optim.name == "adamw":
        betas = (optim.beta1, optim.beta2)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=optim.eps)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum)
    raise ConfigError(
        f"optim.name={optim.name} exists only in PopTorch; torch has adamw and sgd. Set"
        " optim.name, or engine.name=poptorch on a machine with IPUs."
    )


def learning_rate_ratios(
    optimizer: torch.optim.Optimizer, model: nn.Module, lr: float
) -> List[float]:
    """Return the rate of each group divided by `lr`, which the schedule keeps.

    Raises ConfigError if it is no optimizer, as where `configure_optimizers` returns also a
    scheduler, or if all groups of the whole model have the same other rate.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"configure_optimizers returned {type(optimizer).__name__}. Return one optimizer; a"
            " schedule is ViTModule.learning_rate(step, total_steps)."
        )
    ratios = [group["lr"] / lr for group in optimizer.param_groups]
    is_whole = not any(parameter.is_meta for parameter in model.parameters())
    if is_whole and len(set(ratios)) == 1 and ratios[0] != 1.0:
        raise ConfigError(
            f"configure_optimizers uses lr={optimizer.param_groups[0]['lr']:g} for all parameters,"
            f" and {lr:g} is what the schedule and the logs mean. Pass"
            " lr=self.config.peak_lr; only some groups may have a rate of their own."
        )
    return ratios


def freeze_others(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Freeze the parameters in no group: their gradients would only add up and be clipped."""
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    for parameter in model.parameters():
        if id(parameter) not in trained and not parameter.is_meta:
            parameter.requires_grad_(False)
