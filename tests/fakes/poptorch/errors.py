"""poptorch.Error and the form of its messages."""

from __future__ import annotations


class Error(Exception):
    """Base of PopTorch's errors; those of the front end have the type `poptorch_py_error`."""

    message = ""
    type = ""
    location = ""


class RecoverableError(Error):
    recovery_action = ""


class UnrecoverableError(Error):
    pass


def python_error(message: str) -> Error:
    """An error raised by PopTorch's Python code."""
    return _make(message, "poptorch_py_error")


def compiler_error(message: str) -> Error:
    """An error raised by PopTorch's C++ code, at compile time or on the device."""
    return _make(message, "poptorch_cpp_error")


def _make(message: str, kind: str) -> Error:
    error = Error(f"'{kind}': {message}")
    error.message, error.type = message, kind
    return error
