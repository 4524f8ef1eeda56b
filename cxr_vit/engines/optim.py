"""Optimizer state by hub name: which states fit together."""

from __future__ import annotations

from typing import Dict, Iterable, Mapping, Tuple

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


def torch_slots(slots: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Return the slots that torch knows, without those of PopTorch only."""
    return {
        slot: value
        for slot, value in slots.items()
        if not slot.startswith("ipu_") and slot != NO_STATE
    }
