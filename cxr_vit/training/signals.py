"""Stop a run on SIGINT and SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Callable, Dict, Optional


class StopOnSignal:
    """Context in which the first SIGINT or SIGTERM calls `interrupt` with the reason.

    Outside the main thread it does nothing: Python handles signals there only. `quiet` prints
    nothing and ignores further signals, for one of several processes: torchrun signals all
    remaining processes when one ends, and kills them later.
    """

    def __init__(self, interrupt: Callable[[str], None], *, quiet: bool = False) -> None:
        self.interrupt = interrupt
        self.quiet = quiet
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
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
        text = f"\n{name}: saving after this step; a second signal ends the run at once\n"
        os.write(2, text.encode())  # stderr: a handler may not use a buffered stream

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
