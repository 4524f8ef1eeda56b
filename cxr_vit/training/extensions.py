"""Callbacks and loggers of a user's own, named in the configuration by import path."""

from __future__ import annotations

import importlib
import inspect
from typing import Type, TypeVar

from cxr_vit.config.schema import Extension
from cxr_vit.errors import ConfigError, suggestion

T = TypeVar("T")


def load_extension(extension: Extension, base: Type[T], *, key: str) -> T:
    """Import a class and construct it with its arguments.

    Only subclasses of `base` are constructed, so that a configuration from elsewhere cannot call
    any function. `key` is the field that names the class. Raises ConfigError if there is no such
    class, it is of another kind, or it takes other arguments.
    """
    where = f"{key}: {extension.path}"
    path, _, name = extension.path.rpartition(".")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ConfigError(
            f"{where}: cannot import {path} ({error}). Install its package, or put its folder on"
            " PYTHONPATH."
        ) from error
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError(f"{where}: {path} has no {name}.{suggestion(name, dir(module))}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{where} is not a subclass of cxr_vit.{base.__name__}.")
    try:
        inspect.signature(found).bind(**extension.args)
    except TypeError as error:
        raise ConfigError(
            f"{where}: {error}. Its arguments are {inspect.signature(found)}."
        ) from error
    return found(**extension.args)
