"""benchmarks.throughput --scale: time and memory against images, tokens and processes.

The model is small, so that the input path and the bookkeeping are what is measured. The cases of a
group take turns over the rounds, as the ways of benchmarks.throughput do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

from benchmarks.throughput import (
    WAYS,
    Process,
    Round,
    Settings,
    all_stopped,
    kept,
    measure_round,
    ratios,
    training_flops,
    write_images,
)

#: Images of the data set; NIH ChestX-ray14 has 112,120.
IMAGES = (1_000, 10_000, 112_120)
#: Sides of the image, which with patches of 8 pixels have 64 to 1,024 tokens (and the class token).
SIDES = (64, 96, 128, 192, 256)
PROCESSES = (1, 2)
MODEL, PATCH, SIDE = "vit-micro", 8, 32
#: Images of the cases that do not ask for more: a few epochs of small batches.
FEW = 1_000


class Case(NamedTuple):
    """What is timed: settings, and the number of processes on this machine."""

    settings: Settings
    processes: int = 1


def measure(arguments: argparse.Namespace, folder: Path) -> Dict[str, Any]:
    """Measure the groups one after another; return the results."""
    groups = {
        "images": {
            count: Case(settings_of(arguments, folder / f"images_{count}", count, SIDE))
            for count in IMAGES
        },
        "tokens": {
            (side // PATCH) ** 2: Case(settings_of(arguments, folder / f"side_{side}", FEW, side))
            for side in SIDES
        },
        "processes": {
            count: Case(settings_of(arguments, folder / f"processes_{count}", FEW, SIDE), count)
            for count in PROCESSES
        },
    }
    return {
        group: interleaved(cases, arguments.rounds, folder / group)
        for group, cases in groups.items()
    }


def settings_of(arguments: argparse.Namespace, root: Path, count: int, side: int) -> Settings:
    """Write images; return the settings of a case."""
    print(f"writing {count:,} images of {side} pixels", file=sys.stderr, flush=True)
    return Settings(
        model=MODEL,
        patch_size=PATCH,
        image_size=side,
        root=write_images(root, count, side),
        micro_batch=arguments.micro_batch,
        device=arguments.device,
        precision=arguments.precision,
        threads=arguments.threads,
        workers=arguments.workers,
        warm=arguments.warm,
        settle=max(1, 2 * arguments.workers),
        steps=arguments.steps,
    )


def interleaved(cases: Dict[int, Case], number: int, folder: Path) -> Dict[str, Dict[str, Any]]:
    """Measure the cases in turns; return the figures of each."""
    folder.mkdir()
    processes = {
        count: Process(str(count), folder, case.settings.threads) for count, case in cases.items()
    }
    rounds: Dict[int, List[Round]] = {count: [] for count in cases}
    with all_stopped(processes):
        for count, case in cases.items():
            print(f"starting: {folder.name}, {count:,}", file=sys.stderr, flush=True)
            case.settings.start(processes[count], WAYS["ours"], case.processes)
        for _ in range(number):
            for count, case in cases.items():
                size = case.settings.micro_batch * case.processes
                rounds[count].append(measure_round(processes[count], size, evaluates=False))
    first = [1 / found.training for found in rounds[min(cases)]]
    summary: Dict[str, Dict[str, Any]] = {}
    for count, found in rounds.items():
        times = [1 / one.training for one in found]
        shape = cases[count].settings.shape
        summary[str(count)] = {
            "ms_per_image": round(1e3 * statistics.median(times), 4),
            "images_per_s": round(1 / statistics.median(times), 1),
            "time_to_that_of_the_first": ratios(times, first),
            "gflops_per_image": round(training_flops(shape) / 1e9, 4),
            **kept(processes[count]),
        }
    return summary


def print_table(results: Dict[str, Dict[str, Dict[str, Any]]]) -> None:
    """Print a line for each case."""
    heads = ("ms/image", "to first", "GFLOP/img", "MB", "start s")
    for group, cases in results.items():
        print(f"{group:>12} " + " ".join(f"{head:>10}" for head in heads))
        for count, figures in cases.items():
            print(
                f"{int(count):12,} {figures['ms_per_image']:10.3f}"
                f" {figures['time_to_that_of_the_first']['median']:10.3f}"
                f" {figures['gflops_per_image']:10.4f} {figures['peak_memory_mb']:10,}"
                f" {figures['start_s']:10.1f}"
            )
