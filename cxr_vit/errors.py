"""User-facing errors, which the command line prints without a traceback (exit status 2).

A message states where the error is, what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from typing import Iterable, NamedTuple, Optional


class CxrVitError(Exception):
    """Base of all user-facing errors."""


class ConfigError(CxrVitError):
    """The configuration is invalid; the message lists every problem."""


class DataError(CxrVitError):
    """The CSV, the list files or the images are missing or invalid."""


class ModelError(CxrVitError):
    """The pretrained weights cannot be loaded or do not fit the model."""


class EngineUnavailable(CxrVitError):
    """The requested engine or precision is not available on this machine."""


class DeviceError(CxrVitError):
    """The device or its compiler failed; the message quotes it and gives advice."""


class OutOfMemory(CxrVitError):
    """The CPU or the GPU has not enough memory; the message names a smaller batch."""


class CheckpointError(CxrVitError):
    """A checkpoint is missing, incomplete, damaged or from another model."""


class NonFiniteLoss(CxrVitError):
    """The loss became NaN or infinite; the message names the step and the images."""


class ProcessLost(CxrVitError):
    """Another process of the run ended or does not respond; the message names it."""


class Problem(NamedTuple):
    """A broken rule; ``str()`` joins the parts to a message."""

    #: The setting and its value, e.g. ``"batch.gradient_accumulation=4"``.
    given: str
    #: What is wrong with it, e.g. ``"is less than the 7 pipeline stages."``.
    rule: str
    #: Sentence with the legal values; may be empty.
    allowed: str = ""
    #: Sentence with other remedies; may be empty.
    advice: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


def did_you_mean(word: str, known: Iterable[str]) -> Optional[str]:
    """Return the known word nearest to `word`, or None if none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'known'?"`` to append to a message, or "" if none is near."""
    near = did_you_mean(word, known)
    return f" Did you mean {near!r}?" if near else ""
