"""Stop a run on a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any, Callable, Dict, Optional

#: Ctrl-C, schedulers and `timeout`, Slurm's warning before a time limit, and a lost terminal.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopOnSignal:
    """Context in which the first signal of `_SIGNALS` calls `interrupt` with the reason.

    A second one has the effect it has outside of the context, which ends the process at once; only
    a second SIGHUP is ignored, as the system and the shell both send one. Signals that are ignored,
    as SIGHUP is under `nohup`, stay ignored. Outside the main thread it does nothing: Python
    handles signals there only. `quiet` prints nothing and ignores further signals, for one of
    several processes: torchrun signals all remaining processes when one ends, and kills them later.
    """

    def __init__(self, interrupt: Callable[[str], None], *, quiet: bool = False) -> None:
        self.interrupt = interrupt
        self.quiet = quiet
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        name = signal.Signals(number).name
        self.interrupt(f"{name} received")
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)
            _leave_lost_terminal()
        if self.quiet:
            return
        self._restore(but=number if number == signal.SIGHUP else None)
        text = f"\n{name}: saving after this host batch; a second signal ends the run at once\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # stderr: a handler may not use a buffered stream

    def _restore(self, but: Optional[int] = None) -> None:
        for number, handler in self._before.items():
            if number != but:
                signal.signal(number, handler)


def _leave_lost_terminal() -> None:
    """Discard further output if it goes to a terminal that is gone: printing would fail."""
    for descriptor in filter(_is_lost, (1, 2)):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def _is_lost(descriptor: int) -> bool:
    try:
        os.write(descriptor, b"")
    except OSError:
        return True
    return False
