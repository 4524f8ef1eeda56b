"""Terminal output: progress bars, columns of text, and number formats."""

from __future__ import annotations

import contextlib
import logging
import textwrap
import time
from typing import Callable, Iterator, List, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

logger = logging.getLogger(__name__)

#: Seconds between log lines where there is no terminal.
_LOG_EVERY_S = 30.0


def progress_bar(console: Console, label: str) -> Progress:
    """Make a bar: label, bar, count, the task's description, and the time left."""
    time_left = ("eta", TimeRemainingColumn())
    return Progress(
        label, BarColumn(), MofNCompleteColumn(), "{task.description}", *time_left, console=console
    )


@contextlib.contextmanager
def progress(label: str, *, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr: a bar on a terminal, else a log line every 30 seconds.

    Yields a function to call with the number of items just finished.
    """
    first, started = done, time.monotonic()
    logged = started
    console = Console(stderr=True)
    bar = progress_bar(console, label)
    task = bar.add_task("", total=total, completed=done)

    def advance(items: int) -> None:
        nonlocal done, logged
        done += items
        now = time.monotonic()
        rate = (done - first) / max(now - started, 1e-9)
        bar.update(task, completed=done, description=f"{rate:.0f}/s")
        if not console.is_terminal and now - logged >= _LOG_EVERY_S:
            logged = now
            left_s = (total - done) / rate
            logger.info("%s: %d of %d, %.0f/s, %.0f s left", label, done, total, rate, left_s)

    with bar if console.is_terminal else contextlib.nullcontext():
        yield advance


def prose(label: str, text: str) -> List[str]:
    """Wrap text to 100 columns beside a label of 8."""
    return textwrap.wrap(text, 100, initial_indent=f"{label:8}", subsequent_indent=" " * 8)


def columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> List[str]:
    """Align rows in columns: the first `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def percent(share: float) -> str:
    """Format a share: ``"12.5 %"``."""
    return f"{100 * share:.1f} %"


def signed_percent(share: float) -> str:
    """Format a difference: ``"+12.5 %"``."""
    return f"{round(100 * share, 1) + 0.0:+.1f} %"  # + 0.0 turns -0.0 into 0.0


def count(number: int, thing: str) -> str:
    """Format a number of things: ``"1 stage"``, ``"2 stages"``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
