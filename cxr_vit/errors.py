"""User-facing errors.

Each message says where, what was given, what is allowed and what to do. The command line prints it
without a traceback and exits with status 2.
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
    """Base of all errors whose message is meant for the user."""


class ConfigError(CxrVitError):
    """The configuration is wrong; the message lists every problem found."""


class DataError(CxrVitError):
    """The CSV, the list files or the images are missing or not what they should be."""


class ModelError(CxrVitError):
    """The pretrained weights cannot be had or do not fit the model."""


class EngineUnavailable(CxrVitError):
    """The engine or the precision asked for cannot run on this machine."""


class DeviceError(CxrVitError):
    """The device or its compiler gave up; the message holds its words and what to do."""


class CheckpointError(CxrVitError):
    """A checkpoint is missing, incomplete, damaged or of another model."""


class NonFiniteLoss(CxrVitError):
    """The loss became NaN or infinite; the message names the step and the images."""


class ProcessLost(CxrVitError):
    """Another process of the run ended or does not answer; the message names it."""


class Problem(NamedTuple):
    """One broken rule, for a message or for code that reacts to it.

    Attributes
    ----------
    given
        The setting and its value: ``"batch.gradient_accumulation=4"``.
    rule
        What is wrong with it, continuing the sentence: ``"is less than the 7 pipeline stages."``.
    allowed
        Legal values, a whole sentence; may be empty.
    advice
        What else to do, a whole sentence; may be empty.
    """

    given: str
    rule: str
    allowed: str = ""
    advice: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


def did_you_mean(word: str, known: Iterable[str]) -> Optional[str]:
    """Return the known word nearest to `word`, or None where none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
