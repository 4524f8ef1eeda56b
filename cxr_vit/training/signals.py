"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once.

Of several processes each may get one, or only some; which of them stop, and when, they agree on.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, Callable, Dict, Optional

__all__ = ["StopOnSignal"]


class StopOnSignal:
    """A context in which the first SIGINT or SIGTERM calls `interrupt`.

    Parameters
    ----------
    interrupt
        Takes the reason in words.
    quiet
        One of several processes: say nothing, and let no further signal end it while it saves.
        torchrun signals all that are left as soon as one has ended, and kills them in the end.
    """

    def __init__(self, interrupt: Callable[[str], None], *, quiet: bool = False) -> None:
        self.interrupt = interrupt
        self.quiet = quiet
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        name = signal.Signals(number).name
        self.interrupt(f"{name} received")
        if self.quiet:
            return
        self._restore()
        text = f"\n{name}: saving after this step; once more ends the run at once\n"
        os.write(sys.stderr.fileno(), text.encode())  # a handler may not use a buffered stream

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
