"""The callbacks and loggers of a run: built-in, named in the configuration, and given in code."""

from __future__ import annotations

import importlib
import inspect
from typing import List, Optional, Sequence, Type, TypeVar

from cxr_vit.config.schema import Config, Extension
from cxr_vit.errors import ConfigError, suggestion
from cxr_vit.training.callback import Callback
from cxr_vit.training.callbacks import default_callbacks
from cxr_vit.training.loggers import BUILT_IN, Logger

T = TypeVar("T")


def all_callbacks(config: Config, given: Sequence[Callback], *, is_main: bool) -> List[Callback]:
    """Return the built-in callbacks, those of the configuration and those given, in this order.

    Raises ConfigError if one cannot be used.
    """
    configured = [load_extension(item, Callback, key="callbacks") for item in config.callbacks]
    own = [*configured, *_instances(given, Callback, "callbacks")]
    callbacks = [*default_callbacks(config, own, is_main=is_main), *own]
    _refuse_same_keys(callbacks)
    return callbacks


def all_loggers(config: Config, given: Optional[Sequence[Logger]]) -> List[Logger]:
    """Return the loggers given, or those of the configuration; ConfigError if one is unusable."""
    if given is not None:
        return _instances(given, Logger, "loggers")
    return [
        BUILT_IN[item]() if isinstance(item, str) else load_extension(item, Logger, key="loggers")
        for item in config.loggers
    ]


def load_extension(extension: Extension, base: Type[T], *, key: str) -> T:
    """Import a class and construct it with its arguments.

    Only subclasses of `base` are constructed. Importing a module runs it, though: resume only runs
    whose configuration you trust. `key` is the field that names the class. Raises ConfigError if
    there is no such class, it is of another kind, or it takes other arguments.
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


def _instances(items: Sequence[T], base: Type[T], what: str) -> List[T]:
    """Return the items; ConfigError if one is not an instance of `base`."""
    for item in items:
        if isinstance(item, type):
            raise ConfigError(f"{what}: {item.__name__} is a class. Give {item.__name__}(...).")
        if not isinstance(item, base):
            raise ConfigError(f"{what}: {item!r} is no cxr_vit.{base.__name__}.")
    return list(items)


def _refuse_same_keys(callbacks: Sequence[Callback]) -> None:
    """Raise ConfigError if a checkpoint could hold the state of only one of two callbacks."""
    keys = [
        callback.state_key
        for callback in callbacks
        if type(callback).state_dict is not Callback.state_dict
    ]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"callbacks: two have the state_key {key!r}. Override one of them.")
