"""The arguments of a wrapped model: bound to its forward, and fixed by compilation."""

from __future__ import annotations

import inspect
import logging
from typing import Any, Callable, Dict, List, Tuple

import torch

from .errors import python_error
from .structure import rebuild, tensors_of

_logger = logging.getLogger("poptorch::python")

_ADVICE = (
    "\nThis error occurred because the inputs passed at runtime don't match the inputs used to"
    " compile the model.\nTo recompile the model for the new inputs create a new inferenceModel /"
    " trainingModel wrapper or call destroy() on the current one and try again."
)


class Arguments:
    """Positional arguments with their names, and keyword arguments."""

    def __init__(self, args: List[Any], names: List[str], kwargs: Dict[str, Any]) -> None:
        self.args, self.names, self.kwargs = args, names, kwargs

    @property
    def tensors(self) -> List[torch.Tensor]:
        return tensors_of((self.args, self.kwargs))

    def with_tensors(self, tensors: List[torch.Tensor]) -> Tuple[List[Any], Dict[str, Any]]:
        """Return arguments of the same structure with other tensors."""
        return rebuild((self.args, self.kwargs), tensors)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
        args, kwargs = self.with_tensors([change(tensor) for tensor in self.tensors])
        return Arguments(args, self.names, kwargs)

    def check_same(self, given: Arguments) -> None:
        """Raise unless a graph compiled for these arguments can run with `given`."""
        if len(given.args) != len(self.args):
            raise python_error(
                f"Number of positional arguments mismatch: expected {len(self.args)} arguments but"
                f" got {len(given.args)}.{_ADVICE}"
            )
        for name, compiled, value in zip(self.names, self.args, given.args):
            _check_same(name, compiled, value)
        _check_same("named arguments", self.kwargs, given.kwargs)


def _check_same(name: str, compiled: Any, given: Any) -> None:
    def differs(what: str, expected: Any, got: Any) -> None:
        if expected != got:
            raise python_error(f"{what} for {name}: expected {expected} but got {got}.{_ADVICE}")

    differs("Type mismatch", type(compiled), type(given))
    if isinstance(compiled, torch.Tensor):
        differs("Data type mismatch", compiled.dtype, given.dtype)
        differs("Shape mismatch", compiled.shape, given.shape)
    elif isinstance(compiled, (tuple, list)):
        differs("Length mismatch", len(compiled), len(given))
        for number, (expected, got) in enumerate(zip(compiled, given)):
            _check_same(f"{name}[{number}]", expected, got)
    elif isinstance(compiled, dict):
        differs("Keys mismatch", sorted(compiled, key=str), sorted(given, key=str))
        for key, expected in compiled.items():
            _check_same(f"{name}[{key}]", expected, given[key])
    else:
        # a constant of the compiled graph
        differs("Value mismatch", compiled, given)


class ArgumentsParser:
    """Binds the arguments of a call to the forward of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = list(inspect.signature(model.forward).parameters.values())
        kinds = [parameter.kind for parameter in self._parameters]
        self._open_ended = any(
            kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            for kind in kinds
        )
        self._warned = False

    def __call__(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Arguments:
        names = [parameter.name for parameter in self._parameters]
        if not self._open_ended:
            assert len(args) + len(kwargs) <= len(names), (
                f"Too many arguments provided: expected {names} ({len(names)}) but got"
                f" {len(args) + len(kwargs)}"
            )
            for name in kwargs:
                assert name in names, f"{name} is not a valid parameter.Allowed values are {names}"
        return self._contiguous(self._bind(args, dict(kwargs)))

    def _bind(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Arguments:
        bound = Arguments([], [], {})
        named_only = False
        for number, parameter in enumerate(self._parameters):
            name = parameter.name
            if parameter.kind == inspect.Parameter.VAR_KEYWORD:
                bound.kwargs.update(kwargs)
            elif parameter.kind == inspect.Parameter.VAR_POSITIONAL:
                named_only = True
                for index, value in enumerate(args[number:]):
                    bound.args.append(value)
                    bound.names.append(f"*{name}[{index}]")
            elif number < len(args) and not named_only:
                assert name not in kwargs, f"Parameter {name} was passed more than once"
                bound.args.append(args[number])
                bound.names.append(name)
            else:
                value = self._named(parameter, kwargs)
                if named_only or parameter.kind == inspect.Parameter.KEYWORD_ONLY:
                    bound.kwargs[name] = value
                else:
                    bound.args.append(value)
                    bound.names.append(name)
        return bound

    @staticmethod
    def _named(parameter: inspect.Parameter, kwargs: Dict[str, Any]) -> Any:
        if parameter.name in kwargs:
            return kwargs.pop(parameter.name)
        if parameter.default is inspect.Parameter.empty:
            raise python_error(f"Mandatory parameter {parameter.name} missing")
        return parameter.default

    def _contiguous(self, bound: Arguments) -> Arguments:
        if all(tensor.is_contiguous() for tensor in bound.tensors):
            return bound
        if not self._warned:
            _logger.warning(
                "At least one input tensor is not contiguous: non-contiguous tensors will be "
                "converted."
            )
            self._warned = True
        return bound.each(torch.Tensor.contiguous)
