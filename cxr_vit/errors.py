"""User-facing errors.

A message states where the error is, what was given, what is allowed and what to do. The command
line prints it without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
from typing import Iterable, NamedTuple, Optional

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CxrVitError",
    "DataError",
    "DeviceError",
    "EngineUnavailable",
    "ModelError",
    "NonFiniteLoss",
    "Problem",
    "ProcessLost",
    "did_you_mean",
]


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


class CheckpointError(CxrVitError):
    """A checkpoint is missing, incomplete, damaged or from another model."""


class NonFiniteLoss(CxrVitError):
    """The loss became NaN or infinite; the message names the step and the images."""


class ProcessLost(CxrVitError):
    """Another process of the run ended or does not respond; the message names it."""


class Problem(NamedTuple):
    """A broken rule; ``str()`` joins the parts to a message.

    Attributes
    ----------
    given
        The setting and its value, e.g. ``"batch.gradient_accumulation=4"``.
    rule
        What is wrong with it, e.g. ``"is less than the 7 pipeline stages."``.
    allowed
        Sentence with the legal values; may be empty.
    advice
        Sentence with other remedies; may be empty.
    """

    given: str
    rule: str
    allowed: str = ""
    advice: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


def did_you_mean(word: str, known: Iterable[str]) -> Optional[str]:
    """Return the known word nearest to `word`, or None if none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
