"""An optimizer's state by hub name: what engines can take from each other, and PopTorch's names.

AdamW's moments mean the same in torch and in PopTorch and are stored under torch's names. What only
PopTorch knows (LAMB's and SGD's state, the values it has on the device) keeps its own names, behind
`ipu_state:` or `ipu_param:`.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping

import torch
from torch import Tensor

__all__ = ["from_poptorch", "to_poptorch"]


Slots = Dict[str, Dict[str, Tensor]]

#: Slots of PopART's AdamW -> torch's.
_ADAMW = {"Accl1": "exp_avg", "Accl2": "exp_avg_sq", "Step": "step"}

#: Stands for a parameter's name where PopTorch's value is of the whole optimizer.
_WHOLE = "*"

_KEY = "___"


def from_poptorch(state: Mapping[str, Any], hub_names: Mapping[str, str], kind: str) -> Slots:
    """Turn PopTorch's `optimizer.state_dict()` into slots by hub name.

    Parameters
    ----------
    state
        With `ipu_state` and `ipu_param`, e.g. ``{"Accl1___model.classifier.bias": ...}`` and
        ``{"learningRate___specific___model.classifier.bias": ..., "lossScaling_FLOAT": ...}``.
    hub_names
        Parameter name in the wrapped model -> hub name.
    kind
        The optimizer, e.g. ``"poptorch.AdamW"``.
    """
    slots: Slots = {}
    for table in ("ipu_state", "ipu_param"):
        for key, value in (state[table] or {}).items():
            what, _, name = key.rpartition(_KEY)
            hub = hub_names.get(name, _WHOLE)
            slot = what if name in hub_names else key
            known = _ADAMW if kind.startswith("poptorch.AdamW") and table == "ipu_state" else {}
            slot = known.get(slot, f"{table}:{slot}")
            slots.setdefault(hub, {})[slot] = torch.as_tensor(value).clone()
    return slots


def to_poptorch(
    slots: Mapping[str, Mapping[str, Tensor]],
    names: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype],
) -> Dict[str, Dict[str, Tensor]]:
    """Turn slots by hub name into PopTorch's `ipu_state` and `ipu_param`.

    Parameters
    ----------
    slots
        Of `from_poptorch`, or of torch's AdamW.
    names
        Hub name -> parameter name in the wrapped model.
    dtypes
        PopART's moment -> the dtype the device holds it in.
    """
    state: Dict[str, Dict[str, Tensor]] = {"ipu_state": {}, "ipu_param": {}}
    theirs = {ours: popart for popart, ours in _ADAMW.items()}
    for hub, values in slots.items():
        for slot, value in values.items():
            table, _, what = slot.rpartition(":")
            table, what = table or "ipu_state", theirs.get(what, what)
            key = what if hub == _WHOLE else f"{what}{_KEY}{names[hub]}"
            state[table][key] = value.to(dtypes.get(what, value.dtype), copy=True)
    return state
