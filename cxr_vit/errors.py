"""The errors a person can cause and mend, and the words that help them.

Every one of them says where, what was given, what is allowed and what to do. The command line
prints the message without a traceback and exits with status 2. Imports nothing of the package.
"""

from __future__ import annotations

import difflib
from typing import Iterable, Optional

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CxrVitError",
    "DataError",
    "DeviceError",
    "EngineUnavailable",
    "ModelError",
    "NonFiniteLoss",
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


def did_you_mean(word: str, known: Iterable[str]) -> Optional[str]:
    """Return the known word nearest to `word`, or None where none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
