"""benchmarks.throughput --scale: time and memory against images, tokens and processes.

The model is small, so that the input path and the bookkeeping are what is measured. The cases of a
group take turns over the rounds, as the ways of benchmarks.throughput do.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional

import torch

from benchmarks.throughput import (
    WAYS,
    Process,
    Round,
    Settings,
    Turns,
    all_stopped,
    kept,
    measure_round,
    ratios,
    shared_settings,
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


def measure(
    arguments: argparse.Namespace, folder: Path, save: Callable[[Dict[str, Any]], None]
) -> Dict[str, Any]:
    """Measure the groups one after another, save the results after each, and return them."""

    def case(name: str, images: int, side: int, processes: int = 1) -> Case:
        return Case(settings_of(arguments, folder / name, images, side), processes)

    groups: Dict[str, Callable[[], Dict[int, Case]]] = {
        "images": lambda: {count: case(f"images_{count}", count, SIDE) for count in IMAGES},
        "tokens": lambda: {(side // PATCH) ** 2: case(f"side_{side}", FEW, side) for side in SIDES},
        "processes": lambda: {
            count: case(f"processes_{count}", FEW, SIDE, count) for count in PROCESSES
        },
    }
    results: Dict[str, Any] = {}
    for group, cases in groups.items():
        results[group] = interleaved(cases(), arguments.rounds, folder / group)
        save(results)
    return results


def settings_of(arguments: argparse.Namespace, root: Path, count: int, side: int) -> Settings:
    """Write images; return the settings of a case."""
    steps = arguments.steps
    if arguments.device == "cpu":  # a step of 1,024 tokens takes seconds
        steps = max(4, steps * SIDE**2 // side**2)
    print(f"writing {count:,} images of {side} pixels", file=sys.stderr, flush=True)
    return Settings(
        model=MODEL,
        patch_size=PATCH,
        image_size=side,
        root=write_images(root, count, side),
        steps=steps,
        **shared_settings(arguments),
    )


def left_out(case: Case) -> Optional[str]:
    """Return why a case cannot be measured here, or None. Each process has a GPU of its own."""
    gpus = torch.cuda.device_count()
    if case.settings.device == "cuda" and case.processes > gpus:
        return f"needs {case.processes} GPUs, and this machine has {gpus}"
    return None


def interleaved(cases: Dict[int, Case], number: int, folder: Path) -> Dict[str, Dict[str, Any]]:
    """Measure the cases in turns; return the figures of each."""
    folder.mkdir()
    named = {str(count): case for count, case in cases.items()}
    status = {name: why for name, why in zip(named, map(left_out, named.values())) if why}
    processes = {
        # The processes of a case share the cores.
        name: Process(name, folder, max(1, case.settings.threads // case.processes))
        for name, case in named.items()
        if name not in status
    }

    def start(name: str) -> None:
        named[name].settings.start(processes[name], WAYS["ours"], named[name].processes)

    def measure_one(name: str) -> Round:
        size = named[name].settings.micro_batch * named[name].processes
        return measure_round(processes[name], size, evaluates=False)

    with all_stopped(processes):
        turns = Turns(processes, start)
        for index in range(number):
            turns.take(index, measure_one)
    status.update(turns.failed)
    times = {name: [1 / one.training for one in found] for name, found in turns.rounds.items()}
    first = times[str(min(cases))]
    summary: Dict[str, Dict[str, Any]] = {}
    for name, case in named.items():
        figures: Dict[str, Any] = {"status": status[name]} if name in status else {}
        if times.get(name):
            median = statistics.median(times[name])
            figures["ms_per_image"] = round(1e3 * median, 4)
            figures["images_per_s"] = round(1 / median, 1)
            if first:
                figures["time_to_that_of_the_first"] = ratios(times[name], first)
            flops = training_flops(case.settings.shape)
            figures["gflops_per_image"] = round(flops / 1e9, 4)
            figures.update(kept(processes[name]))
        summary[name] = figures
    return summary


def print_table(results: Dict[str, Dict[str, Dict[str, Any]]]) -> None:
    """Print a line for each case."""
    heads = ("ms/image", "to first", "GFLOP/img", "MB", "start s")
    for group, cases in results.items():
        print(f"{group:>12} " + " ".join(f"{head:>10}" for head in heads))
        for count, figures in cases.items():
            if "status" in figures:
                print(f"{int(count):12,} {figures['status']}")
            if "ms_per_image" not in figures:
                continue
            ratio = figures.get("time_to_that_of_the_first", {"median": math.nan})["median"]
            print(
                f"{int(count):12,} {figures['ms_per_image']:10.3f} {ratio:10.3f}"
                f" {figures['gflops_per_image']:10.4f} {figures['peak_memory_mb']:10,}"
                f" {figures['start_s']:10.1f}"
            )
