"""Decode many films on all cores, a chunk at a time. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cxr_vit.errors import DataError

__all__ = [
    "CHUNK_FILMS",
    "Chunk",
    "default_workers",
    "film_progress",
    "in_chunks",
    "in_parallel",
]

logger = logging.getLogger(__name__)

#: Films a task: a fraction of a second of decoding, so that little is lost with a process.
CHUNK_FILMS = 64
#: Processes take longer to start than so few films to decode.
_FEW_FILMS = 256
#: Without a terminal, a line is logged so often, seconds.
_LOG_EVERY_S = 30.0

Result = TypeVar("Result")


class Chunk(NamedTuple):
    """Films next to each other: the row of the first, and their paths."""

    first_row: int
    paths: List[str]


def in_chunks(paths: Sequence[str]) -> List[Chunk]:
    """Cut films into tasks."""
    return [
        Chunk(start, list(paths[start : start + CHUNK_FILMS]))
        for start in range(0, len(paths), CHUNK_FILMS)
    ]


def default_workers(given: Optional[int]) -> int:
    """Return `data.cache_workers`, by default the cores this process may use."""
    if given is not None:
        return given
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_parallel(
    function: Callable[[Chunk], Result], chunks: Sequence[Chunk], *, workers: int
) -> Iterator[Result]:
    """Yield the results of a function on each chunk, as they come.

    Parameters
    ----------
    function
        Picklable: a function of a module, or a partial of one.
    chunks
        The work.
    workers
        Processes; one, or few films, and this process does it.

    Raises
    ------
    DataError
        If a process ends before its work.
    """
    if workers == 1 or sum(len(chunk.paths) for chunk in chunks) <= _FEW_FILMS:
        for chunk in chunks:
            yield function(chunk)
        return
    # Spawned and not forked: this process may have threads (torch's, a progress bar's).
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    futures: List[Future[Result]] = []
    try:
        with _interrupts_held():
            # One by one: a signal may come through all the same, and what is submitted by then
            # has to be known to be cancelled.
            for chunk in chunks:
                futures.append(pool.submit(function, chunk))  # noqa: PERF401
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:  # which every future has got by now
        raise DataError(
            "a process that decodes films ended before its work: killed, out of memory, or started"
            ' from a script without `if __name__ == "__main__":`. Run the command again, which'
            " goes on where it stopped; data.cache_workers=1 decodes in the main process."
        ) from error
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    finally:
        pool.shutdown()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes that leave Ctrl-C to their parent: they inherit what it holds back."""
    resource_tracker.ensure_running()  # which would let it through as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Do not outlive the parent, even if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


@contextlib.contextmanager
def film_progress(doing: str, *, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far it is and how long it will take: a bar on a terminal, else log lines.

    Parameters
    ----------
    doing
        A word or two, e.g. ``"decoding films"``.
    done, total
        Films at the start, and in all.

    Yields
    ------
    Callable
        To be called with the number of films just done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LoggedProgress(doing, done, total).advance
        return
    bar = Progress(
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        _FilmsPerSecond(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(doing, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


class _FilmsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f}/s")


class _LoggedProgress:
    def __init__(self, doing: str, done: int, total: int) -> None:
        self.doing, self.done, self.total = doing, done, total
        self.first = done
        self.started = self.logged = time.monotonic()

    def advance(self, count: int) -> None:
        """Count films, and log a line when one is due."""
        self.done += count
        now = time.monotonic()
        if now - self.logged < _LOG_EVERY_S:
            return
        self.logged = now
        rate = (self.done - self.first) / (now - self.started)
        logger.info(
            "%s: %d of %d, %.0f a second, %.0f s left",
            self.doing,
            self.done,
            self.total,
            rate,
            (self.total - self.done) / rate,
        )
