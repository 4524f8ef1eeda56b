"""Nested arguments and results: their tensors in order, and back."""

from __future__ import annotations

from typing import Any, Iterable, Iterator, List

import torch


def tensors_of(structure: Any) -> List[torch.Tensor]:
    """Return the tensors of nested dicts, lists and tuples; skip anything else."""
    return list(_walk(structure))


def _walk(structure: Any) -> Iterator[torch.Tensor]:
    if isinstance(structure, torch.Tensor):
        yield structure
    elif isinstance(structure, dict):
        for value in structure.values():
            yield from _walk(value)
    elif isinstance(structure, (list, tuple)):
        for value in structure:
            yield from _walk(value)


def rebuild(structure: Any, tensors: Iterable[torch.Tensor]) -> Any:
    """Return `structure` with its tensors replaced, in order, by `tensors`."""
    return _rebuild(structure, iter(tensors))


def _rebuild(structure: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(structure, torch.Tensor):
        return next(tensors)
    if isinstance(structure, dict):
        return type(structure)({key: _rebuild(structure[key], tensors) for key in structure})
    if hasattr(structure, "_fields") and hasattr(structure, "_asdict"):
        return type(structure)(*(_rebuild(value, tensors) for value in structure))
    if isinstance(structure, (list, tuple)):
        return type(structure)(_rebuild(value, tensors) for value in structure)
    return structure
