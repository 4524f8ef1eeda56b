"""Start processes that do not run the user's script again."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from types import ModuleType
from typing import Any, Callable, Iterator, Optional, TypeVar

Result = TypeVar("Result")


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Hide the script from the processes that are started within the context.

    A spawned process imports the script of its parent, to unpickle what is defined there. Without
    `if __name__ == "__main__":` it would run the script, and wait for its parent forever. What our
    processes call is defined in the package.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def usable_cores() -> int:
    """Return how many cores this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


class SpawnedPool(ProcessPoolExecutor):
    """Processes that call functions of the package; they end with this process.

    They are spawned, not forked, as this process may have threads (torch's, a progress bar's). The
    first calls start them. They ignore Ctrl-C: their parent handles it.
    """

    def __init__(self, workers: Optional[int]) -> None:
        context = multiprocessing.get_context("spawn")
        super().__init__(
            workers or usable_cores(), mp_context=context, initializer=_end_with_parent
        )

    def submit(  # type: ignore[override,unused-ignore]  # with fewer options
        self, function: Callable[..., Result], *arguments: Any
    ) -> Future[Result]:
        """Call a picklable function in one of the processes."""
        with _sigint_blocked(), without_main_module():
            return super().submit(function, *arguments)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start processes that ignore Ctrl-C: they inherit the mask."""
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this process when the parent ends, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
