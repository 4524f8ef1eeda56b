"""poptorch.Error and how its messages are put together."""

from __future__ import annotations


class Error(Exception):
    """What PopTorch raises; the front end's own carry the type `poptorch_py_error`."""

    message = ""
    type = ""
    location = ""


class RecoverableError(Error):
    recovery_action = ""


class UnrecoverableError(Error):
    pass


def python_error(message: str) -> Error:
    """An error of PopTorch's Python side."""
    return _make(message, "poptorch_py_error")


def compiler_error(message: str) -> Error:
    """An error of PopTorch's C++ side: at compile time or on the device."""
    return _make(message, "poptorch_cpp_error")


def _make(message: str, kind: str) -> Error:
    error = Error(f"'{kind}': {message}")
    error.message, error.type = message, kind
    return error
