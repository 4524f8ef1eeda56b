"""What tests can inspect: calls into the device, executables, and the simulated hardware.

The harness of the front end has the same functions, so that one test file runs on both.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Tuple

import torch


@dataclasses.dataclass
class Config:
    """The simulated hardware. `hardware_version` 0 means that there is no IPU."""

    hardware_version: int = 2
    available_ipus: int = 16
    check_options: bool = True
    check_blocks: bool = True
    half_fallback: bool = True


@dataclasses.dataclass
class Call:
    name: str
    args: Tuple[Any, ...]


class CallLog(List[Call]):
    """Every call into the device, in order."""

    def record(self, name: str, *args: Any) -> None:
        self.append(Call(name, tuple(_brief(argument) for argument in args)))

    def calls(self, name: str) -> List[Call]:
        return [call for call in self if call.name == name]

    def names(self) -> List[str]:
        return [call.name for call in self]


def _brief(argument: Any) -> Any:
    """Replace tensors by their shapes: the log must not keep weights alive or read wrapped ones."""
    if isinstance(argument, torch.Tensor):
        return f"Tensor{tuple(argument.shape)}"
    if isinstance(argument, (list, tuple)) and not hasattr(argument, "_fields"):
        return type(argument)(_brief(item) for item in argument)
    if isinstance(argument, dict):
        return {key: _brief(value) for key, value in argument.items()}
    return argument


_config = Config()
_log = CallLog()


def config() -> Config:
    return _config


def log() -> CallLog:
    return _log


def executable(poptorch_model: Any) -> Any:
    """Return the executable of a wrapped model, or None before compilation."""
    return poptorch_model._executable


def annotations(model: torch.nn.Module) -> Dict[str, Tuple[Any, Any]]:
    """Return module name -> (user_id, ipu_id) of its BeginBlock."""
    from .blocks import BlockHook

    return {
        name: (hook.user_id, hook.ipu_id)
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, BlockHook)
    }


def reset() -> None:
    """Clear the log, release every IPU and restore the default hardware."""
    from . import device

    _log.clear()
    device.release_all()
    for field in dataclasses.fields(Config):
        setattr(_config, field.name, field.default)
