"""Parameter groups and torch's optimizers."""

from __future__ import annotations

import contextlib
import re
from functools import lru_cache
from typing import Any, Dict, Iterable, Iterator, List, Tuple, Union

import torch
from torch import nn

from cxr_vit.config.schema import Config, OptimSection
from cxr_vit.errors import ConfigError

#: What the hub names of the head begin with; `fc_norm` normalises the mean of the patches.
_HEAD = ("classifier.", "fc_norm.")
_TRUNK = re.compile(r"\w+\.(embeddings|encoder\.layer\.(?P<layer>\d+))\.")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: to the matrices of the layers only.

    Biases, norms and LayerScale are vectors. Tokens and position embeddings have more dimensions,
    but are no weights of a layer; they are recognised by their hub names.
    """
    return parameter.dim() > 1 and not name.endswith(("_token", "position_embeddings"))


def layer_id(name: str, depth: int) -> int:
    """Return the place of a parameter, by hub name, in the order of the forward pass.

    It is 0 in the embeddings, i + 1 in encoder layer i, and `depth` + 1 in the final norm and the
    head.
    """
    place = None if name.startswith(_HEAD) else _TRUNK.match(name)
    if place is None:
        return depth + 1
    return 0 if place["layer"] is None else 1 + int(place["layer"])


def is_trained(name: str, freeze: Union[str, int], depth: int) -> bool:
    """Whether `model.freeze` leaves a parameter to be trained."""
    if name.startswith(_HEAD) or freeze == "none":
        return True
    return freeze != "trunk" and layer_id(name, depth) > int(freeze)


def rate_scale(name: str, optim: OptimSection, depth: int) -> float:
    """Return the factor on the rate of a parameter.

    The layer decay is that of MAE (He et al. 2022, its `param_groups_lrd`), which has it from BEiT
    (Bao et al. 2022).
    """
    scale = optim.layer_decay ** (depth + 1 - layer_id(name, depth))
    return scale * optim.head_lr_scale if name.startswith(_HEAD) else scale


def parameter_groups(
    parameters: Iterable[Tuple[str, nn.Parameter]], config: Config, *, depth: int
) -> List[Dict[str, Any]]:
    """Group (hub name, parameter) pairs by their rate and by whether weight decay applies.

    The groups with the lowest rate come first, and the decayed ones of each rate. A group has an
    ``"lr"`` if it is not `config.peak_lr`. `depth` is the number of encoder layers of the whole
    model. Frozen parameters are in no group.
    """
    optim = config.optim
    found: Dict[Tuple[float, bool], List[nn.Parameter]] = {}
    for name, parameter in parameters:
        if is_trained(name, config.model.freeze, depth):
            is_kept = not (optim.decay_all or is_decayed(name, parameter))
            key = rate_scale(name, optim, depth), is_kept
            found.setdefault(key, []).append(parameter)
    return [
        {
            "params": found[scale, is_kept],
            "weight_decay": 0.0 if is_kept else optim.weight_decay,
            **({} if scale == 1.0 else {"lr": config.peak_lr * scale}),
        }
        for scale, is_kept in sorted(found)
    ]


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
        options: Dict[str, Any] = {"fused": True} if _can_fuse(groups) else {}
        betas = (optim.beta1, optim.beta2)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=optim.eps, **options)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum, nesterov=optim.nesterov)
    raise ConfigError(
        f"optim.name={optim.name} exists only in PopTorch; torch has adamw and sgd. Set"
        " optim.name, or engine.name=poptorch on a machine with IPUs."
    )


def _can_fuse(groups: List[Dict[str, Any]]) -> bool:
    """Whether torch has an AdamW in one kernel for these parameters."""
    weights = [weight for group in groups for weight in group["params"]]
    if not weights or all(weight.is_cuda for weight in weights):
        return bool(weights)
    # The kernel for CPUs takes the memory of weights, gradients and moments in order.
    return _has_fused_on_cpus() and all(
        weight.device.type == "cpu" and weight.is_floating_point() and weight.is_contiguous()
        for weight in weights
    )


@lru_cache(maxsize=None)
def _has_fused_on_cpus() -> bool:
    """Whether torch has the kernel for CPUs; it came with torch 2.4."""
    try:
        torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    except RuntimeError:
        return False
    return True


def learning_rate_ratios(optimizer: torch.optim.Optimizer, lr: float) -> List[float]:
    """Return the rate of each group divided by `lr`, the peak, which the schedule keeps.

    Raises ConfigError if it is no optimizer, as where `configure_optimizers` returns also a
    scheduler, or if groups without a rate of their own have another one than `lr`.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"configure_optimizers returned {type(optimizer).__name__}. Return one optimizer; a"
            " schedule is ViTModule.learning_rate(step, total_steps)."
        )
    rates, default = [group["lr"] for group in optimizer.param_groups], optimizer.defaults["lr"]
    if default != lr and default in rates:
        raise ConfigError(
            f"configure_optimizers passes lr={default:g} to {type(optimizer).__name__}, and"
            f" {lr:g} is what the schedule and the logs mean. Pass lr=self.config.peak_lr; only"
            " groups may have rates of their own."
        )
    return [rate / lr for rate in rates]


@contextlib.contextmanager
def explaining_missing_rate(config: Config) -> Iterator[None]:
    """Raise ConfigError where a module's own code computes with `optim.lr`, and it is None."""
    try:
        yield
    except TypeError as error:
        if config.optim.lr is not None or "NoneType" not in str(error):
            raise
        raise ConfigError(
            f"{error}: config.optim.lr is None with optim.base_lr. Use self.config.peak_lr in"
            " configure_optimizers and learning_rate, or set optim.lr."
        ) from error


def freeze_others(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Freeze the parameters in no group: their gradients would only add up and be clipped."""
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    for parameter in model.parameters():
        if id(parameter) not in trained and not parameter.is_meta:
            parameter.requires_grad_(False)
