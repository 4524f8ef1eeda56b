"""Call a reader on one input within limits of time and memory, and check how it refuses."""

from __future__ import annotations

import signal
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Optional, Tuple, Type

import pytest

from cxr_vit.errors import CxrVitError

SECONDS = 5.0
MEBIBYTES = 1000
_STATUS = Path("/proc/self/status")
_PEAK = Path("/proc/self/clear_refs")
#: Linux: this resets the peak to the present size.
_RESET_PEAK = "5"


class TooSlow(BaseException):
    """No Exception: a reader that turns all of them into its own must not hide it."""


def _too_slow(number: int, frame: Optional[FrameType]) -> None:
    raise TooSlow


def memory_mib(key: str) -> float:
    """Return a size of this process, `VmRSS` or its peak `VmHWM`."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def reset_peak() -> None:
    """Let `VmHWM` begin at the present size; skip the test where that is not possible."""
    try:
        _PEAK.write_text(_RESET_PEAK)
    except OSError as error:
        pytest.skip(f"the peak of memory cannot be reset: {error}")


def within_limits(
    function: Callable[..., Any],
    *arguments: Any,
    allowed: Tuple[Type[Exception], ...] = (CxrVitError,),
) -> Any:
    """Call the function and return its result, or the allowed error that it raises.

    Fails after 5 seconds, if memory grows by more than 1 GB, on any other exception, and on a
    message that says nothing or holds a traceback.
    """
    reset_peak()
    before = memory_mib("VmRSS")
    handler = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(*arguments)
    except TooSlow:
        raise AssertionError(f"still running after {SECONDS} s") from None
    except allowed as error:
        result = error
        _check_message(str(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    seconds = time.perf_counter() - start
    assert seconds < SECONDS, f"took {seconds:.1f} s"  # the alarm waits for the end of C code
    grown = memory_mib("VmHWM") - before
    assert grown < MEBIBYTES, f"took {grown:.0f} MiB"
    return result


def _check_message(message: str) -> None:
    assert message.strip(), "an error without a message"
    assert "Traceback (most recent call last)" not in message, message
