"""Blocks of a model, and the operations that exist only on the device."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Optional

import torch

from . import tracing
from .errors import python_error
from .inspection import log


def begin_ipu_block(stage: int, phase: int, ipu: int) -> None:
    """Assign the following operations to `ipu` and `stage`."""
    for value in (stage, phase, ipu):
        if not isinstance(value, int):
            raise TypeError(f"begin_ipu_block expects ints, got {value!r}")
    log().record("begin_ipu_block", stage, phase, ipu)
    if tracing.current() is not None:
        tracing.current().begin_block(stage, phase, ipu)


def end_ipu_block() -> None:
    log().record("end_ipu_block")
    if tracing.current() is not None:
        tracing.current().end_block()


class Block(torch.nn.Module):
    """A context manager that assigns the operations within to the block; no effect on the CPU."""

    # Set by the execution strategy while a model is traced.
    _stages_manager: Any = None

    def __init__(self, user_id: Optional[str] = None, ipu_id: Optional[int] = None) -> None:
        super().__init__()
        self._user_id = user_id
        self._ipu_id = ipu_id

    @staticmethod
    def useAutoId() -> None:
        if Block._stages_manager is not None:
            Block._stages_manager.resetAutoId()

    @staticmethod
    def start(user_id: Optional[str] = None, ipu_id: Optional[int] = None) -> None:
        if Block._stages_manager is not None:
            Block._stages_manager.beginStage(user_id, ipu_id)

    def __enter__(self) -> None:
        Block.start(self._user_id, self._ipu_id)

    def __exit__(self, *exception: object) -> None:
        end_ipu_block()


class BlockHook:
    """The hook of a BeginBlock: the module and all later operations belong to the block."""

    def __init__(self, user_id: Optional[str], ipu_id: Optional[int]) -> None:
        self.user_id = user_id
        self.ipu_id = ipu_id

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        manager = Block._stages_manager
        if manager is not None:
            if self.user_id is None:
                self.user_id = manager.nextAutoId()
            manager.beginStage(self.user_id, self.ipu_id)

    def __deepcopy__(self, memory: Any) -> BlockHook:
        # An automatic id given during tracing must be the same in the model and its device copy.
        return self

    def __repr__(self) -> str:
        return f"BeginBlock(user_id={self.user_id}, ipu_id={self.ipu_id})"


def BeginBlock(
    layer_to_call: torch.nn.Module, user_id: Optional[str] = None, ipu_id: Optional[int] = None
) -> torch.nn.Module:
    """Begin a block where `layer_to_call` is called; return the module itself."""
    if not isinstance(layer_to_call, torch.nn.Module):
        raise python_error("module is not an instance of torch.nn.Module or function.")
    if any(isinstance(hook, BlockHook) for hook in layer_to_call._forward_pre_hooks.values()):
        raise python_error("module has already been assigned to a block.")
    layer_to_call.register_forward_pre_hook(BlockHook(user_id, ipu_id))
    return layer_to_call


def removeBlocks(module: torch.nn.Module) -> None:
    """Remove the BeginBlocks of a model."""
    assert isinstance(module, torch.nn.Module)
    for part in module.modules():
        part._forward_pre_hooks = OrderedDict(
            (key, hook)
            for key, hook in part._forward_pre_hooks.items()
            if not isinstance(hook, BlockHook)
        )


def recomputationCheckpoint(*tensors: Any) -> Any:
    """Store these activations instead of recomputing them in the backward pass."""
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        return type(tensors[0])(recomputationCheckpoint(*tensors[0]))
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise ValueError("All inputs must be tensors")
    for tensor in tensors:
        log().record("recomputation_checkpoint", tensor)
        if tracing.current() is not None:
            tracing.current().checkpoints += 1
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def identity_loss(x: torch.Tensor, reduction: str) -> torch.Tensor:
    """Mark the start of the backward pass."""
    assert reduction in ("sum", "mean", "none"), "Unsupported reduction type!"
    log().record("identity_loss", x, ("sum", "mean", "none").index(reduction))
    # A new node of the graph also for "none", to distinguish the mark from the marked loss.
    result = {"sum": torch.sum, "mean": torch.mean, "none": lambda loss: loss * 1}[reduction](x)
    tracing.mark_loss(result)
    return result
