"""Parameter groups, torch's optimizers, and their state by hub name."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, Tuple

import torch
from torch import Tensor, nn

from cxr_vit.config.schema import OptimSection
from cxr_vit.errors import CheckpointError, ConfigError

#: Optimizers whose states mean the same.
_SAME_STATE = {"torch.AdamW", "poptorch.AdamW"}


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: to the matrices of the layers only.

    Biases and norms are vectors. The class token and the position embeddings have more dimensions,
    but are no weights of a layer; they are recognised by their hub names.
    """
    return parameter.dim() > 1 and not name.endswith(("cls_token", "position_embeddings"))


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
    parameters: Iterable[Tuple[str, nn.Parameter]], optim: OptimSection
) -> torch.optim.Optimizer:
    """Build torch's AdamW (Loshchilov and Hutter, 2019) or SGD.

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
        f"optim.name={optim.name} exists only in PopTorch; torch has adamw and sgd. Set"
        " optim.name, or engine.name=poptorch on a machine with IPUs."
    )


def check_kind(given: str, own: str) -> None:
    """Refuse the state of another optimizer.

    Parameters
    ----------
    given
        `EngineState.optimizer_kind`; empty for weights only.
    own
        The engine's.

    Raises
    ------
    CheckpointError
        If the engine cannot continue from it.
    """
    if given in ("", own) or {given, own} <= _SAME_STATE:
        return
    raise CheckpointError(
        f"the checkpoint holds the optimizer state of {given}; this engine has {own}. Resume with"
        " the engine and optimizer that wrote it, or from the weights alone with a new optimizer:"
        " train.resume_weights_only=true."
    )


def torch_slots(slots: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Return the slots that torch knows, without those of PopTorch only."""
    return {slot: value for slot, value in slots.items() if not slot.startswith("ipu_")}
