"""PopTorch's optimizers, and their state by hub name.

AdamW's moments mean the same in torch and in PopTorch, so they are stored under torch's names.
State that only PopTorch has (of LAMB and SGD, and values on the device) keeps PopTorch's names
after the prefix `ipu_state:` or `ipu_param:`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Dict, List, Mapping

import torch
from torch import Tensor

from cxr_vit.config.poptorch_options import MARK_CONSTANT
from cxr_vit.config.schema import Config, OptimSection
from cxr_vit.engines.optim import NO_STATE, WHOLE
from cxr_vit.errors import ConfigError
from cxr_vit.model.module import ViTModule
from cxr_vit.model.optim import explaining_missing_rate

if TYPE_CHECKING:
    import poptorch


Slots = Dict[str, Dict[str, Tensor]]

logger = logging.getLogger(__name__)

_DTYPES: Dict[Any, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
#: Setting -> attributes of PopTorch's optimizers that can have it.
_ATTRIBUTES = {
    "loss_scaling": ("loss_scaling",),
    "accumulator": ("accum_type",),
    "first_moment": ("first_order_momentum_accum_type", "velocity_accum_type"),
    "second_moment": ("second_order_momentum_accum_type",),
}
#: Slots of PopART's AdamW -> torch's.
_ADAMW = {"Accl1": "exp_avg", "Accl2": "exp_avg_sq", "Step": "step"}
#: Separates slot and parameter in PopTorch's keys.
_SEPARATOR = "___"


def module_optimizer(module: ViTModule, config: Config) -> poptorch.optim.Optimizer:
    """Return the optimizer of a module: PopTorch's counterpart of ours, or the module's own.

    Raises ConfigError if the module's own is one of torch's, or does not clip as configured.
    """
    from poptorch import optim as poptorch_optim

    if type(module).configure_optimizers is ViTModule.configure_optimizers:
        return poptorch_optimizer(module.parameter_groups(), config.optim, lr=config.peak_lr)
    with explaining_missing_rate(config):
        own = module.configure_optimizers()
    if not isinstance(own, poptorch_optim.Optimizer):
        raise ConfigError(
            f"{type(module).__name__}.configure_optimizers returns {type(own).__module__}."
            f"{type(own).__name__}. The update is compiled for the IPU, so PopTorch takes only"
            " optimizers of poptorch.optim (AdamW, Adam, LAMB, SGD, RMSprop): return one of them"
            " where self.for_ipu is true, or set engine.name=torch."
        )
    _check_settings(own, config.optim)
    return own


def mark_constants(optimizer: poptorch.optim.Optimizer, options: Mapping[str, Any]) -> None:
    """Have values compiled in that the options of training name; they then cannot change."""
    try:
        for name in options.get(MARK_CONSTANT, []):
            optimizer.variable_attrs.markAsConstant(name)
    except AssertionError as error:  # the module's own optimizer may not have it
        raise ConfigError(
            f"{MARK_CONSTANT}: {name}: the optimizer of configure_optimizers"
            f" ({type(optimizer).__name__}) has no such value. Leave it out."
        ) from error


def _check_settings(own: poptorch.optim.Optimizer, optim: OptimSection) -> None:
    """Refuse clipping that the module's own optimizer does not do; warn of settings it ignores."""
    if optim.max_grad_norm is not None and _max_grad_norm(own) == float("inf"):
        raise ConfigError(
            f"optim.max_grad_norm={optim.max_grad_norm}, but the optimizer of configure_optimizers"
            f" ({type(own).__name__}) does not clip. Pass it max_grad_norm (AdamW, Adam), or set"
            " optim.max_grad_norm=null."
        )
    ignored = [
        f"optim.{key}={getattr(optim, key)}"
        for key, attributes in _ATTRIBUTES.items()
        if getattr(optim, key) not in ("auto", type(optim).model_fields[key].default)
        and _DTYPES.get(getattr(optim, key), getattr(optim, key))
        not in [getattr(own, name, None) for name in attributes]
    ]
    if ignored:
        logger.warning("configure_optimizers does not use %s", ", ".join(ignored))


def _max_grad_norm(optimizer: poptorch.optim.Optimizer) -> float:
    return float(getattr(optimizer, "max_grad_norm", "inf"))


def poptorch_optimizer(
    groups: List[Dict[str, Any]], optim: OptimSection, *, lr: float
) -> poptorch.optim.Optimizer:
    """Build PopTorch's AdamW, LAMB or SGD.

    Values passed to the constructor can be changed later; omitted ones are compiled in.
    """
    from poptorch import optim as poptorch_optim

    shared: Dict[str, Any] = {
        "lr": lr,
        "weight_decay": optim.weight_decay,
        "loss_scaling": 1.0 if optim.loss_scaling == "auto" else optim.loss_scaling,
        "accum_type": _DTYPES[optim.accumulator],
    }
    if optim.name == "sgd":
        return poptorch_optim.SGD(
            groups,
            momentum=optim.momentum,
            # Compiled in either way; PopART tells graphs with and without it apart by what is
            # given, not by its value.
            nesterov=optim.nesterov or None,
            velocity_accum_type=_DTYPES[optim.first_moment],
            use_combined_accum=optim.use_combined_accum,
            **shared,
        )
    shared["betas"] = (optim.beta1, optim.beta2)
    shared["eps"] = optim.eps
    shared["first_order_momentum_accum_type"] = _DTYPES[optim.first_moment]
    shared["second_order_momentum_accum_type"] = _DTYPES[optim.second_moment]
    if optim.name == "lamb":
        return poptorch_optim.LAMB(
            groups,
            bias_correction=optim.bias_correction,
            max_weight_norm=optim.max_weight_norm,
            **shared,
        )
    clip = float("inf") if optim.max_grad_norm is None else optim.max_grad_norm
    return poptorch_optim.AdamW(groups, max_grad_norm=clip, **shared)


def optimizer_kind(optimizer: poptorch.optim.Optimizer, optim: OptimSection) -> str:
    """Return the kind of optimizer state, for example ``"poptorch.AdamW"``."""
    name = type(optimizer).__name__
    kind = f"poptorch.{name}"
    if optim.loss_scaling == "auto" or name == "SGD":
        # An automatic scale has state of its own. SGD's velocity is multiplied by a fixed scale,
        # which a module's own optimizer may have set.
        scale = "auto" if optim.loss_scaling == "auto" else optimizer.loss_scaling
        kind += f" with loss scaling {scale}"
    if getattr(optimizer, "use_combined_accum", False):
        kind += ", combined accumulator"
    if not getattr(optimizer, "bias_correction", True):  # has no step
        kind += ", no bias correction"
    return kind


def moment_dtypes(optimizer: poptorch.optim.Optimizer) -> Dict[str, torch.dtype]:
    """Return the dtypes of PopART's moments by slot."""
    slots = {"Accl1": _ATTRIBUTES["first_moment"], "Accl2": _ATTRIBUTES["second_moment"]}
    return {
        slot: getattr(optimizer, name)
        for slot, attributes in slots.items()
        for name in attributes
        if hasattr(optimizer, name)
    }


def from_poptorch(state: Mapping[str, Any], hub_names: Mapping[str, str], kind: str) -> Slots:
    """Convert PopTorch's `optimizer.state_dict()` to slots by hub name.

    Parameters
    ----------
    state
        With `ipu_state`, such as ``{"Accl1___model.classifier.bias": ...}``, and `ipu_param`, such
        as ``{"learningRate___specific___model.classifier.bias": ..., "lossScaling_FLOAT": ...}``.
    hub_names
        Parameter name in the wrapped model -> hub name.
    """
    slots: Slots = {}
    for table in ("ipu_state", "ipu_param"):
        for key, value in (state[table] or {}).items():
            what, _, name = key.rpartition(_SEPARATOR)
            hub = hub_names.get(name, WHOLE)
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
    """Convert slots by hub name, also of torch's AdamW, to PopTorch's `ipu_state` and `ipu_param`.

    `names` maps hub names to parameter names in the wrapped model, `dtypes` is the result of
    `moment_dtypes`.
    """
    state: Dict[str, Dict[str, Tensor]] = {"ipu_state": {}, "ipu_param": {}}
    popart_slots = {slot: popart for popart, slot in _ADAMW.items()}
    for hub, values in slots.items():
        for slot, value in values.items():
            if slot == NO_STATE:
                continue
            table, _, what = slot.rpartition(":")
            table, what = table or "ipu_state", popart_slots.get(what, what)
            key = what if hub == WHOLE else f"{what}{_SEPARATOR}{names[hub]}"
            state[table][key] = value.to(dtypes.get(what, value.dtype), copy=True)
    return state
