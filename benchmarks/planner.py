"""Time of the planner: one plan and two searches, each as a separate command.

    python -m benchmarks.planner [--rounds N] [--out FILE]

The searches: all cuts of 12 layers on 4 IPUs x 6 micro-batches x 5 accumulations, and of 24 layers
on 8. Prints a table and writes a JSON file; the exit status is 1 if a command exceeds its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from benchmarks.machine import describe_machine
from cxr_vit.cli import run

REPOSITORY = Path(__file__).resolve().parents[1]
POD4 = ("--config", "configs/vit_pod4.yaml")
GRID = ("--micro-batches", "1,2,4,8,16,17", "--accumulations", "8,16,32,64,128")
LARGE = (
    "model.name=google/vit-large-patch16-224-in21k",
    "pipeline.layers_per_stage=[3,3,3,3,3,3,3,3]",
    "pipeline.recompute=every_layer",
    "batch.eval_device_iterations=8",
)


class Case(NamedTuple):
    """A command and the limit of its time."""

    name: str
    arguments: Tuple[str, ...]
    limit_s: float


CASES = (
    Case("plan", POD4, 1.0),
    Case("search, 12 layers on 4 IPUs", (*POD4, "--search", *GRID), 2.0),
    Case("search, 24 layers on 8 IPUs", (*POD4, *LARGE, "--search", *GRID), 30.0),
)


def measure(case: Case, rounds: int) -> Dict[str, Any]:
    """Time a command as a whole process; return its row of the JSON file."""
    seconds: List[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cxr_vit", "plan", *case.arguments],
            cwd=str(REPOSITORY),
            stdout=subprocess.PIPE,
            check=True,
        )
        seconds.append(time.perf_counter() - start)
    first = done.stdout.decode().splitlines()[0]
    return {**case._asdict(), "seconds": seconds, "first_line": first}


def main(argv: Sequence[str]) -> int:
    """Measure all commands; return 1 if one exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("planner.json"), metavar="FILE")
    arguments = parser.parse_args(argv)
    result = {**describe_machine("numpy", "pydantic"), "rounds": arguments.rounds}
    print(f"{result['machine']}, {result['cores']} cores, Python {result['python']}")
    print(f"{'':30} {'median s':>9} {'lowest..highest':>16} {'limit':>9}")
    rows = []
    for case in CASES:
        row = measure(case, arguments.rounds)
        rows.append(row)
        span = f"{min(row['seconds']):.2f}..{max(row['seconds']):.2f}"
        median = statistics.median(row["seconds"])
        print(f"{case.name:30} {median:9.2f} {span:>16} {case.limit_s:9.0f}  {row['first_line']}")
    arguments.out.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n")
    slow = [row for row in rows if statistics.median(row["seconds"]) > row["limit_s"]]
    return 1 if slow else 0


if __name__ == "__main__":
    run(main)
