"""Optimizer state by hub name: which states fit together."""

from __future__ import annotations

from typing import Dict, Iterable, Mapping, Set, Tuple, Union

import torch
from torch import Tensor, nn

from cxr_vit.errors import CheckpointError

#: Slot of a trained parameter without state, as it never had a gradient. It tells the parameter
#: from one that was frozen.
NO_STATE = "no_state"
#: Used instead of a hub name for values of the whole optimizer.
WHOLE = "*"
#: Optimizers whose states mean the same.
_SAME_STATE = {"torch.AdamW", "poptorch.AdamW"}


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


def check_trained(
    slots: Mapping[str, Mapping[str, Tensor]], parameters: Iterable[Tuple[str, nn.Parameter]]
) -> None:
    """Refuse a state, by hub name, of a run in which a parameter was frozen that is trained here.

    Raises CheckpointError with the first such parameter.
    """
    for name, parameter in parameters if slots else ():
        if parameter.requires_grad and name not in slots:
            raise CheckpointError(
                f"the checkpoint lacks the optimizer state of {name}, which was frozen in that run."
                " Freeze it again (model.freeze), or resume from the weights alone with a new"
                " optimizer: train.resume_weights_only=true."
            )


def counts_on_device(optimizer: torch.optim.Optimizer) -> Set[int]:
    """Return the ids of the parameters whose `step` is on their device; others' is on the CPU."""
    return {
        id(parameter)
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }


class SkipOnDevice:
    """Leaves out the updates of gradients that are not finite, without waiting for the device.

    torch's fused kernels read `found_inf`, which GradScaler sets, on the device. With `sticks`, the
    updates after such a one are left out too, up to the end of the next host batch: the host,
    which is one host batch ahead, then stops the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, sticks: bool) -> None:
        self.optimizer = optimizer
        self.sticks = sticks
        self._found_before: Union[Tensor, bool] = False  # in the host batch before
        self._found: Union[Tensor, bool] = False  # in this one

    def begin(self) -> None:
        """Begin a host batch."""
        self._found_before, self._found = self._found, False

    def add(self, norm: Tensor) -> None:
        """Tell the optimizer whether to make the update of a gradient with this norm."""
        found = norm.isfinite().logical_not()
        self._found = found | self._found
        leaves_out = self._found | self._found_before if self.sticks else found
        vars(self.optimizer)["found_inf"] = leaves_out.float()


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `SkipOnDevice` works: the optimizer is a fused Adam, or has no parameters.

    torch's fused SGD cannot: if its first update is left out, its momentum remains uninitialised.
    """
    groups = [group for group in optimizer.param_groups if group["params"]]
    is_adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return not groups or (is_adam and all(group["fused"] for group in groups))


def torch_slots(slots: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Return the slots that torch knows, without those of PopTorch only."""
    return {
        slot: value
        for slot, value in slots.items()
        if not slot.startswith("ipu_") and slot != NO_STATE
    }


def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a copy of a slot with the dtype, device and memory format of its parameter.

    torch's fused kernel for CPUs takes the memory of both in order.
    """
    if value.shape != parameter.shape:  # of an optimizer that keeps less, as Adafactor
        return value.to(parameter, copy=True)
    return torch.empty_like(parameter).copy_(value)
