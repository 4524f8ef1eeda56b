"""What PopTorch's errors mean and what to do, for those a pipelined ViT most likely meets.

The texts are those of PopTorch 3.4; docs/ipu.md has the same table with the causes.
"""

from __future__ import annotations

import re
from typing import Tuple, Type

from cxr_vit.errors import CxrVitError, DeviceError, EngineUnavailable

__all__ = ["explained"]

_ADVICE: Tuple[Tuple[str, Type[CxrVitError], str], ...] = (
    (
        r"Failed to acquire",
        EngineUnavailable,
        "Another process holds the IPUs, or the partition has fewer: see `gc-monitor`. Wait with"
        " POPTORCH_WAIT_FOR_IPU=1, lower batch.replicas, or use fewer stages.",
    ),
    (
        r"out of memory|Memory allocation error|OutOfMemory",
        DeviceError,
        "The graph does not fit an IPU. Try, in this order: batch.micro_batch_size=1,"
        " pipeline.recompute=every_layer, fewer layers on the fullest stage,"
        " pipeline.available_memory_proportion=0.2, optim.first_moment=fp16,"
        " engine.optimizer_state_on_chip=false, more stages. engine.profile_dir=<folder> shows"
        " where the memory went.",
    ),
    (
        r"Unsupported ops found",
        DeviceError,
        "This transformers has an operation PopTorch cannot compile. Install the pins:"
        " pip install -r requirements-sdk34.txt",
    ),
    (
        r"tracked gradient tensors|AutomaticLossScal",
        DeviceError,
        "Automatic loss scaling does not fit this graph. Set optim.loss_scaling=1024, say.",
    ),
    (
        r"Unknown [\w /]*option",
        DeviceError,
        "An entry of engine.popart_options is not known to this SDK. Leave it out.",
    ),
)
_REST = (
    "If it comes again, run with POPTORCH_LOG_LEVEL=DEBUG and see docs/ipu.md; the last checkpoint"
    " is untouched (--resume)."
)


def explained(error: Exception, doing: str) -> CxrVitError:
    """Return the error as one of ours: what was being done, PopTorch's words, what to do.

    Parameters
    ----------
    error
        `poptorch.Error`.
    doing
        E.g. ``"compiling the training graph"``.
    """
    text = str(error).strip()
    for pattern, kind, advice in _ADVICE:
        if re.search(pattern, text, flags=re.IGNORECASE):
            return kind(f"{doing}: PopTorch says: {text}\n{advice}")
    return DeviceError(f"{doing}: PopTorch says: {text}\n{_REST}")
