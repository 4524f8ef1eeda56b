"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, Callable, Dict, Optional

__all__ = ["StopOnSignal"]


class StopOnSignal:
    """A context in which the first SIGINT or SIGTERM calls `request_stop`.

    Parameters
    ----------
    request_stop
        Takes the reason in words.

    Attributes
    ----------
    received
        The signal's name, None while there was none.
    """

    def __init__(self, request_stop: Callable[[str], None]) -> None:
        self.request_stop = request_stop
        self.received: Optional[str] = None
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        self.received = signal.Signals(number).name
        self.request_stop(f"{self.received} received")
        self._restore()
        text = f"\n{self.received}: saving after this step; once more ends the run at once\n"
        os.write(sys.stderr.fileno(), text.encode())  # a handler may not use a buffered stream

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
