"""The classes that a training model, its parameters and its buffers have while it is wrapped.

Every access to them first copies newer weights from the device.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from typing import Any, Iterator, Set, Type

import torch

from .errors import python_error

_wrapper_types: Set[Type[Any]] = set()


def is_wrapped(thing: Any) -> bool:
    return type(thing) in _wrapper_types


def wrap(model: torch.nn.Module, executor: Any) -> None:
    """Give `model`, its parameters and buffers classes that refresh them from `executor`."""
    # Weak: the user's model must not keep the executor alive, and with it the IPUs.
    reference = weakref.ref(executor)
    parameter_type = _tensor_type(torch.nn.Parameter, "PoptorchParameter", reference)
    buffer_type = _tensor_type(torch.Tensor, "PoptorchBuffer", reference)
    for buffer in model.buffers():
        if type(buffer) is not torch.Tensor and not is_wrapped(buffer):
            raise python_error(
                f"All buffers must be an instance of torch.Tensor (Got {type(buffer)})"
            )
    for parameter in model.parameters():
        parameter.__class__ = parameter_type
    for buffer in model.buffers():
        buffer.__class__ = buffer_type
    model.__class__ = _model_type(type(model), reference)


def unwrap(model: torch.nn.Module) -> None:
    for thing in (*_tensors(model), model):
        if is_wrapped(thing):
            thing.__class__ = type(thing).__bases__[0]


@contextlib.contextmanager
def unwrapped(model: torch.nn.Module) -> Iterator[None]:
    """Restore the original classes of `model` within the context."""
    things = [thing for thing in (*_tensors(model), model) if is_wrapped(thing)]
    types = [type(thing) for thing in things]
    for thing, wrapper in zip(things, types):
        thing.__class__ = wrapper.__bases__[0]
    try:
        yield
    finally:
        for thing, wrapper in zip(things, types):
            thing.__class__ = wrapper


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(list(model.parameters()), list(model.buffers()))


def _refresh(reference: Any) -> bool:
    executor = reference()
    return executor is not None and executor.copyWeightsToHostIfNeeded()


def _tensor_type(base: Type[Any], name: str, reference: Any) -> Type[Any]:
    def getattribute(self: Any, attribute: str) -> Any:
        _refresh(reference)
        return base.__getattribute__(self, attribute)

    # torch reads this attribute if the tensor is an argument; reading it refreshes the tensor.
    def torch_function(cls: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        _refresh(reference)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    wrapper = type(
        name,
        (base,),
        {
            "__getattribute__": getattribute,
            "__torch_function__": classmethod(torch_function),
            "__module__": __name__,
        },
    )
    _wrapper_types.add(wrapper)
    return wrapper


def _model_type(base: Type[Any], reference: Any) -> Type[Any]:
    def getattribute(self: Any, name: str) -> Any:
        if name == "_host_weights_version":
            executor = reference()
            return None if executor is None else executor._host_weights_version
        if name in ("_parameters", "_buffers", "forward"):
            _refresh(reference)
        return object.__getattribute__(self, name)

    def destroy(self: Any) -> None:
        executor = reference()
        if executor is not None:
            executor.destroy()

    def copied(self: Any) -> Any:
        # copy.copy() and pickle know the user's class, not this one.
        wrapper = type(self)
        self.__class__ = base
        try:
            other = copy.copy(self)
        finally:
            self.__class__ = wrapper
        other.__class__ = wrapper
        return other

    def reduced(self: Any, protocol: Any) -> Any:
        _refresh(reference)
        with unwrapped(self):
            state = copy.deepcopy(self.__dict__)
        return _restore, (base, state)

    wrapper = type(
        f"Poptorch{base.__name__}",
        (base,),
        {
            "__getattribute__": getattribute,
            "__copy__": copied,
            "__reduce_ex__": reduced,
            "__module__": __name__,
            "copyWeightsToHostIfNeeded": lambda self: _refresh(reference),
            "destroy": destroy,
        },
    )
    _wrapper_types.add(wrapper)
    return wrapper


def _restore(cls: Type[Any], state: Any) -> Any:
    model = cls.__new__(cls)
    model.__dict__.update(state)
    return model
