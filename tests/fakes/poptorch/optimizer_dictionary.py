"""The dictionary of an optimizer that the device receives: values, and whether they may change."""

from __future__ import annotations

import enum
import numbers
from typing import Any, Dict, Tuple

import torch

from . import optim
from .enums import MeanReductionStrategy


class OptimizerType(enum.IntEnum):
    SGD1 = 0
    SGD2 = 1
    ADAM = 2
    ADAMW = 3
    ADAMW_NO_BIAS = 4
    RMSPROP = 5
    RMSPROP_CENTERED = 6
    LAMB = 7
    LAMB_NO_BIAS = 8


# Values at which an attribute of an optimizer of torch is constant.
_TORCH_DEFAULTS = {
    "weight_decay": 0.0,
    "momentum": 0.0,
    "velocity_scaling": 1.0,
    "dampening": 0.0,
    "eps": 1e-8,
    "loss_scaling": 1.0,
}


def optimizer_dictionary(optimizer: Any, options: Any, is_compiled: bool) -> Dict[str, Any]:
    """Return the dictionary of an optimizer; this may change how `options` reduce gradients."""
    kind, cls = _kind(optimizer)
    _choose_reduction(optimizer, options, is_compiled)
    variable = getattr(optimizer, "variable_attrs", None)
    automatic = options._Popart.options.get("automaticLossScalingSettings.enabled", False)
    if variable is not None and automatic:
        variable.markAsVariable("loss_scaling")
    reader = _Reader(variable, kind == OptimizerType.ADAMW, automatic)
    result: Dict[str, Any] = {"optimizer_type": kind}
    for name in cls._own:
        if name.endswith("accum_type"):
            dtype = getattr(optimizer, name, torch.float32)
            if dtype not in (torch.float16, torch.float32):
                raise ValueError(
                    f"{name} must be set to either torch.float16 or torch.float32 not {{type}}"
                )
            result[_camel(name)] = dtype == torch.float16
        elif name == "max_grad_norm":
            result["maxGradNorm"] = getattr(optimizer, name, float("Inf"))
    result["defaults"] = reader.group(optimizer.defaults, cls._group_attributes)
    scaling = getattr(optimizer, "loss_scaling", 1.0)
    result["defaults"]["lossScaling"] = reader.pair("loss_scaling", scaling)
    result["groups"] = [
        reader.group(group, cls._group_attributes) for group in optimizer.param_groups
    ]
    return result


def _kind(optimizer: Any) -> Tuple[OptimizerType, Any]:
    """Return the type of the optimizer and the optimizer whose attributes apply."""
    if isinstance(optimizer, torch.optim.SGD):
        combined = getattr(optimizer, "use_combined_accum", False)
        return (OptimizerType.SGD1 if combined else OptimizerType.SGD2), optim.SGD
    if isinstance(optimizer, torch.optim.AdamW):
        corrected = getattr(optimizer, "bias_correction", True)
        return (OptimizerType.ADAMW if corrected else OptimizerType.ADAMW_NO_BIAS), optim.AdamW
    corrected = getattr(optimizer, "bias_correction", True)
    assert isinstance(optimizer, optim.LAMB), (
        f"Unsupported optimizer type. Types supported {', '.join(str(t) for t in OptimizerType)}"
    )
    return (OptimizerType.LAMB if corrected else OptimizerType.LAMB_NO_BIAS), optim.LAMB


def _choose_reduction(optimizer: Any, options: Any, is_compiled: bool) -> None:
    half = getattr(optimizer, "accum_type", None) == torch.float16
    if not half or getattr(optimizer, "use_combined_accum", False):
        return
    training = options.Training
    running = MeanReductionStrategy.Running
    if not is_compiled:
        options._unfreeze()
        training.setMeanAccumulationAndReplicationReductionStrategy(running)
        options._freeze()
    elif training.meanAccumulationAndReplicationReductionStrategy != running:
        raise ValueError(
            "Invalid optimizer: the new optimizer would require changing options.Training."
            "meanAccumulationAndReplicationReductionStrategy to "
            "poptorch.MeanReductionStrategy.Running but the executable is already compiled."
        )


class _Reader:
    """Reads attributes as (value, is constant)."""

    def __init__(self, variable: Any, adamw: bool, automatic_loss_scaling: bool) -> None:
        self._variable = variable
        self._defaults = dict(_TORCH_DEFAULTS)
        if adamw:
            self._defaults["weight_decay"] = 1e-2
        if automatic_loss_scaling:
            del self._defaults["loss_scaling"]

    def pair(self, name: str, value: Any) -> Tuple[Any, bool]:
        assert isinstance(value, numbers.Number), f"Expected a number for {name} but got {value}"
        if self._variable is not None:
            return value, self._variable.isConstant(name)
        if name in ("nesterov", "betas"):
            return value, True
        return value, name in self._defaults and value == self._defaults[name]

    def group(self, values: Dict[str, Any], names: Tuple[str, ...]) -> Dict[str, Any]:
        result = {}
        for name in names:
            value = values.get(name, 1.0 if name == "velocity_scaling" else None)
            assert value is not None, f"Mandatory attribute {name} not found in optimizer group"
            if name == "amsgrad":
                if value:
                    raise ValueError("Only non-amsgrad Adam/AdamW optimizers are supported.")
            elif name == "betas":
                assert isinstance(value, tuple) and len(value) == 2, (
                    f"Expected a pair for {name} but got {value} instead"
                )
                result["beta1"] = self.pair("betas", value[0])
                result["beta2"] = self.pair("betas", value[1])
            else:
                result["learningRate" if name == "lr" else _camel(name)] = self.pair(name, value)
        return result


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
