"""Compilation: trace one micro-batch on the device's copy of the model."""

from __future__ import annotations

import copy
from typing import Any, Dict, List, Optional, Tuple

import torch

from .arguments import Arguments
from .errors import compiler_error, python_error
from .executable import Executable
from .inspection import log
from .structure import rebuild, tensors_of
from .tracing import Trace, Tracing
from .wrapping import unwrapped

__all__ = ["trace_and_compile"]


def trace_and_compile(
    executor: Any, inputs: Arguments, micro_batch: Arguments
) -> Tuple[Executable, Any]:
    """Trace one micro-batch and compile; return the executable and the structure of its outputs."""
    with unwrapped(executor._user_model), unwrapped(executor._model):
        device_model = copy.deepcopy(executor._model)
        groups = _group_names(executor) if executor._training else []
    _check_inputs(micro_batch)
    _record_start(device_model, groups)
    before = _tensor_ids(device_model)
    trace = Trace(dict(device_model.named_parameters()))
    hooks = [
        part.register_forward_pre_hook(_placing(trace, name or "<root>"))
        for name, part in device_model.named_modules()
    ]
    failed = True
    try:
        with Tracing(trace, executor._options._execution_strategy) as forward:
            result = device_model(*micro_batch.args, **micro_batch.kwargs)
            loss_error = _error_of(forward.loss) if executor._training else None
        failed = False
        for name in ("startOutputsMove", "endOutputsMove", "finalizeGraph"):
            log().record(name)
    finally:
        log().record("endDispatch", failed)
        for hook in hooks:
            hook.remove()
    _check_same_tensors(before, _tensor_ids(device_model))
    structure = rebuild(result, [tensor.detach() for tensor in tensors_of(result)])
    executable = _build(executor, device_model, trace, inputs, groups, loss_error)
    return executable, structure


def _build(
    executor: Any,
    model: torch.nn.Module,
    trace: Trace,
    inputs: Arguments,
    groups: List[List[str]],
    loss_error: Optional[Exception],
) -> Executable:
    options = executor._options.toDict()
    shown = {k: v for k, v in options.items() if k != "compilation_progress_bar_fn"}
    log().record(
        "compileWithManualTracing",
        shown,
        executor._training,
        executor._dict_optimizer,
        list(executor._options.anchored_tensors.values()),
    )
    executable = Executable(model, trace, inputs, options, executor._training)
    try:
        if loss_error is not None:
            raise loss_error
        if executor._training:
            executable.set_optimizer(executor._dict_optimizer, groups)
    except Exception:
        executable.free()
        raise
    log().record("compiled", executable)
    log().record("destroyDispatcher")
    return executable


def _group_names(executor: Any) -> List[List[str]]:
    names = {tensor.data_ptr(): name for name, tensor in executor._model.named_parameters()}
    return [
        [names[parameter.data_ptr()] for parameter in group["params"]]
        for group in executor._optimizer.param_groups
    ]


def _check_inputs(inputs: Arguments) -> None:
    for tensor in inputs.tensors:
        if 0 in tensor.shape:
            raise compiler_error(
                f"Zero-sized tensors are unsupported (Got shape {list(tensor.shape)})."
            )
    log().record("createGraph", "PopART", inputs.tensors)


def _record_start(model: torch.nn.Module, groups: List[List[str]]) -> None:
    log().record("startParametersMove")
    log().record("endParametersMove")
    log().record("mapParamsToNames", [name for name, _ in model.named_parameters()])
    log().record("mapParamsToNames", [name for name, _ in model.named_buffers()])
    log().record("startDispatch")
    for number, group in enumerate(groups):
        log().record("optimizer_group", number, len(group))


def _placing(trace: Trace, name: str) -> Any:
    def hook(module: torch.nn.Module, inputs: Any) -> None:
        trace.place(name)

    return hook


def _error_of(function: Any) -> Optional[Exception]:
    """Return the error of a check that the compiler makes only after tracing."""
    try:
        function()
    except Exception as error:
        return error
    return None


def _tensor_ids(model: torch.nn.Module) -> Dict[str, Dict[str, int]]:
    return {
        "Buffer": {name: id(tensor) for name, tensor in model.named_buffers()},
        "Parameter": {name: id(tensor) for name, tensor in model.named_parameters()},
    }


def _check_same_tensors(before: Any, after: Any) -> None:
    for kind, tensors in before.items():
        for name, identity in tensors.items():
            if name not in after[kind]:
                raise python_error(
                    f"{kind} {name} is removed from the model when calling the forward method."
                )
            if after[kind][name] != identity:
                raise python_error(
                    f"{kind} {name} is reassigned within the model when calling the forward"
                    f" method. This is not supported. Consider using self.{name}.copy_(src)"
                )
