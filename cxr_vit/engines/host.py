"""What the engines share on the host's side: loader processes and the host's memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
from multiprocessing import forkserver
from typing import Iterable, Iterator

from cxr_vit.data.dataset import Batch
from cxr_vit.errors import DataError

__all__ = ["in_one_line", "leave_the_process_group", "process_peak_gib", "start_fork_server"]


def leave_the_process_group(worker: int = 0) -> None:
    """Let a signal to the whole group (Ctrl-C, `timeout`) reach only the process that saves.

    To ignore signals instead would also ignore the main process's own, which ends its workers.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def start_fork_server() -> None:
    """Start the process that an asynchronous loader's process is forked from, deaf to SIGTERM.

    It stays in the group, and with it a signal to the group would end the loader. What is forked
    from it listens again (`leave_the_process_group`).
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


def in_one_line(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Pass batches on; a worker process's DataError loses the traceback torch wraps it in."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None


def process_peak_gib() -> float:
    """Return the most memory this process has held, in GiB (2**30 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
