"""A stand-in for PopTorch 3.4 that computes on the CPU; see README.md in this folder."""

from __future__ import annotations

import copy
import logging
from typing import Any, Optional, Union

import torch

from . import device, enums, inspection, optim, options
from .blocks import BeginBlock, Block, identity_loss, recomputationCheckpoint, removeBlocks
from .enums import (
    AutoStage,
    CommGroupType,
    ConnectionType,
    DataLoaderMode,
    MeanReductionStrategy,
    OutputMode,
    ReductionType,
    SharingStrategy,
    SyncPattern,
)
from .errors import Error, RecoverableError, UnrecoverableError
from .executor import PoplarExecutor
from .loader import AsynchronousDataAccessor, DataLoader
from .options import Options, TensorLocationSettings
from .strategy import PipelinedExecution, ShardedExecution, Stage
from .tracing import is_running_on_ipu as isRunningOnIpu
from .wrapping import is_wrapped

__version__ = "3.4.0+fake"

__all__ = [
    "AsynchronousDataAccessor",
    "AutoStage",
    "BeginBlock",
    "Block",
    "CommGroupType",
    "ConnectionType",
    "DataLoader",
    "DataLoaderMode",
    "Error",
    "MeanReductionStrategy",
    "Options",
    "OutputMode",
    "PipelinedExecution",
    "PoplarExecutor",
    "RecoverableError",
    "ReductionType",
    "ShardedExecution",
    "SharingStrategy",
    "Stage",
    "SyncPattern",
    "TensorLocationSettings",
    "UnrecoverableError",
    "enums",
    "identity_loss",
    "inferenceModel",
    "inspection",
    "ipuHardwareIsAvailable",
    "ipuHardwareVersion",
    "isRunningOnIpu",
    "optim",
    "options",
    "recomputationCheckpoint",
    "removeBlocks",
    "setLogLevel",
    "trainingModel",
]

_LEVELS = {
    "TRACE": (0, logging.DEBUG),
    "DEBUG": (1, logging.DEBUG),
    "INFO": (2, logging.INFO),
    "WARN": (3, logging.WARNING),
    "ERR": (4, logging.ERROR),
    "OFF": (6, logging.CRITICAL),
}


def trainingModel(
    model: Union[torch.nn.Module, PoplarExecutor],
    options: Optional[Options] = None,
    optimizer: Optional[Any] = None,
) -> PoplarExecutor:
    """Wrap a model for training on the IPU."""
    if isinstance(model, PoplarExecutor):
        model = model._user_model
    if is_wrapped(model):
        raise RuntimeError(
            "Model has already been wrapped in 'poptorch.trainingModel'. Call model.destroy() on"
            " the model to unwrap before wrapping again."
        )
    return PoplarExecutor(
        model=copy.copy(model),
        options=options,
        training=True,
        optimizer=optimizer,
        user_model=model,
    )


def inferenceModel(
    model: Union[torch.nn.Module, PoplarExecutor], options: Optional[Options] = None
) -> PoplarExecutor:
    """Wrap a model for inference; given a training model, use its weights."""
    if isinstance(model, PoplarExecutor):
        model = model._user_model
    return PoplarExecutor(model=copy.copy(model), options=options, training=False)


def ipuHardwareIsAvailable(num_ipus: int = 1) -> bool:
    return device.hardware_version(num_ipus) != 0


def ipuHardwareVersion() -> int:
    version = device.hardware_version()
    assert version != 0, "No IPU hardware available on this system"
    return version


def setLogLevel(level: Union[str, int]) -> None:
    if isinstance(level, int):
        names = [name for name, (number, _) in _LEVELS.items() if number == level]
        if not names:
            raise ValueError("Invalid log level integer")
        level = names[0]
    if level not in _LEVELS:
        raise ValueError(f"Unknown log level: {level}. Valid values are {', '.join(_LEVELS)}")
    number, python_level = _LEVELS[level]
    inspection.log().record("setLogLevel", number)
    logging.getLogger("poptorch::python").setLevel(python_level)
