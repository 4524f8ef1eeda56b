"""The command `summarize`: many seeds of one recipe, or of several.

python -m cxr_vit summarize RUN RUN ... [--out DIR]
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from cxr_vit.cli import COMMANDS, Parser


def summarize(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("summarize", description=COMMANDS["summarize"].summary)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    text = "folder for summary.csv, summary.json and summary.png; default: summary beside the runs"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    arguments = parser.parse(argv)

    from cxr_vit.commands.summary_tables import summarize_runs

    print(f"summary: {summarize_runs(arguments.runs, arguments.out)}")
    return 0
