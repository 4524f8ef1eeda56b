"""How the planner sets its text: columns, sentences beside labels, percentages."""

from __future__ import annotations

import textwrap
from typing import List, Sequence

__all__ = ["columns", "count", "percent", "prose", "signed_percent"]


_WIDTH = 100


def prose(label: str, text: str) -> List[str]:
    """Set a sentence beside its label."""
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{label:8}", subsequent_indent=" " * 8)


def columns(rows: Sequence[Sequence[str]]) -> List[str]:
    """Set rows in columns: the first to the left, all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])),
            ]
        ).rstrip()
        for row in rows
    ]


def percent(share: float) -> str:
    """Write a share."""
    return f"{100 * share:.1f} %"


def count(number: int, thing: str) -> str:
    """Write a number of things."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def signed_percent(share: float) -> str:
    """Write a difference."""
    return f"{round(100 * share, 1) + 0.0:+.1f} %"  # no -0.0
