"""Compare time and memory of a pipeline over four processes with the ideal.

    python -m benchmarks.pipeline [--rounds N] [--micro-batches 4,8,16,32] [--out FILE]

Time: with M micro-batches and S stages, an update ideally takes (M + S - 1) / M times the
steady-state time of its micro-batches; the rest, (S - 1) / (M + S - 1), is the bubble, in which
stages wait. The steady-state time of a micro-batch is the slope of a straight line through the
measured times over M, fitted to the relative errors, so that constant costs of an update do not
count. The stages are measured asleep, each sleeping the same time on any machine, with a tiny
model's real tensors, connections and updates; then at work, where the bubble shows in full only if
each stage has a core or a GPU of its own; then asleep with one stage twice as slow as the others,
compared with the planner's bubble (cxr_vit.planner.timeline).

Memory: the peak of each stage in the same updates, above what it held before them. 1F1B's must not
grow with M; the exit status is 1 if it does. Prints tables and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch

from benchmarks.machine import describe_machine
from cxr_vit.cli import run
from cxr_vit.planner.timeline import StageTime, simulate

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = 4
SCHEDULES = ("gpipe", "1f1b")
#: 1F1B with torch's own stage in place of LeanStage.
PLAIN = "1f1b, plain"
#: Largest ratio of the peak memory at the most micro-batches to the fewest that is no growth.
NO_GROWTH = 1.1
COMMON = ("engine.name=pipeline", "engine.precision=fp32")
MICRO = (*COMMON, "model.name=vit-micro", "pipeline.layers_per_stage=[1,1,1,1]")
#: Five tokens: little computation compared with the sleep.
ASLEEP = (*MICRO, "model.patch_size=16", "data.image_size=32", "batch.micro_batch_size=1")
#: The demo's model; it is so narrow that activations are nearly all of the memory.
DEMO = (*MICRO, "model.patch_size=8", "data.image_size=64")
BASE = (
    *(*COMMON, "model.name=vit-base", "pipeline.layers_per_stage=[3,3,3,3]"),
    *("model.patch_size=16", "data.image_size=224", "batch.micro_batch_size=16"),
)
AT_WORK = {"cpu": (*DEMO, "batch.micro_batch_size=8"), "cuda": BASE}
FOR_MEMORY = {"cpu": (*DEMO, "batch.micro_batch_size=32"), "cuda": BASE}
#: Freed tensors leave the resident memory at once.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

#: Output of the worker for one schedule and number of micro-batches in one round.
Measured = Dict[str, Any]


class Timing(NamedTuple):
    """Time of an update compared with the ideal.

    `ratio` is relative to the steady-state time of the same micro-batches, `bubble` the fraction of
    the update above it, `gap_points` the bubble minus the ideal one, in percentage points.
    """

    schedule: str
    micro_batches: int
    update_s: float
    lowest_s: float
    highest_s: float
    micro_batch_ms: float
    ratio: float
    ideal_ratio: float
    bubble: float
    ideal_bubble: float
    gap_points: float


class Memory(NamedTuple):
    """Peak memory of a stage by number of micro-batches, and the ratio of the last to the first."""

    schedule: str
    stage: int
    peak_mb: Dict[int, float]
    growth: float


def launch(
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    *options: Any,
    schedules: Sequence[str] = SCHEDULES,
    environment: Optional[Dict[str, str]] = None,
) -> List[Measured]:
    """Start the processes with torchrun; return their measurements.

    Raises
    ------
    SystemExit
        If they fail; they have printed the reason.
    """
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        out = Path(folder) / "measured.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", STAGES, "-m", "benchmarks.pipeline_worker", *overrides),
            *("--out", out, "--schedules", *schedules),
            *("--micro-batches", *arguments.micro_batches, *options),
        ]
        done = subprocess.run(
            [str(word) for word in command],
            cwd=str(REPOSITORY),
            env={"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})},
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(done.returncode)
        measured: List[Measured] = json.loads(out.read_text(encoding="utf-8"))
    return measured


def steady_state_s(update_s: Dict[int, float]) -> float:
    """Fit seconds = overhead + slope * micro-batches to the relative errors; return the slope."""
    counts, seconds = np.array(list(update_s)), np.array(list(update_s.values()))
    return float(np.polyfit(counts, seconds, 1, w=1 / seconds)[0])


def timings(
    measured: Sequence[Measured], schedule: str, sleeps_ms: Sequence[float]
) -> List[Timing]:
    """Return the median times of a schedule, with the ideal computed by the planner."""
    own = [sleeps_ms[stage % len(sleeps_ms)] for stage in range(STAGES)]
    times = [StageTime(milliseconds, 0, 2 * milliseconds) for milliseconds in own]
    seconds: Dict[int, List[float]] = {}
    for case in measured:
        if case["schedule"] == schedule:
            seconds.setdefault(case["micro_batches"], []).extend(case["seconds"])
    update_s = {count: statistics.median(values) for count, values in seconds.items()}
    steady_s = steady_state_s(update_s)
    rows = []
    for count, median in update_s.items():
        bubble = 1 - count * steady_s / median
        ideal_bubble = 1 - count * 3 * max(own) / simulate(schedule, times, count).work_s
        rows.append(
            Timing(
                schedule=schedule,
                micro_batches=count,
                update_s=median,
                lowest_s=min(seconds[count]),
                highest_s=max(seconds[count]),
                micro_batch_ms=1000 * median / count,
                ratio=median / (count * steady_s),
                ideal_ratio=1 / (1 - ideal_bubble),
                bubble=bubble,
                ideal_bubble=ideal_bubble,
                gap_points=100 * (bubble - ideal_bubble),
            )
        )
    return rows


def memories(measured: Sequence[Measured], name: str) -> List[Memory]:
    """Return the peaks of each stage from the measurements of one schedule."""
    rows = []
    for stage in range(STAGES):
        peaks = {case["micro_batches"]: case["peak_mb"][stage] for case in measured}
        rows.append(Memory(name, stage, peaks, peaks[max(peaks)] / peaks[min(peaks)]))
    return rows


def measure_time(
    arguments: argparse.Namespace, title: str, *words: Any, sleeps_ms: Sequence[float] = (1,)
) -> Dict[str, Any]:
    """Time both schedules, print a table, return the content of the JSON file.

    `sleeps_ms` are the forward times of the stages, or numbers proportional to them.
    """
    measured = launch(
        arguments, words, "--rounds", arguments.rounds, "--warm-steps", 1, "--steps", 1
    )
    rows = [row for schedule in SCHEDULES for row in timings(measured, schedule, sleeps_ms)]
    print(f"\n{title}")
    print(f"{'':7} {'M':>3} {'s/update':>9} {'lowest..highest':>16} {'ms/micro-batch':>15}", end="")
    print(f" {'over steady':>11} {'ideal':>6} {'bubble':>7} {'ideal':>6} {'gap, points':>11}")
    for row in rows:
        span = f"{row.lowest_s:.3f}..{row.highest_s:.3f}"
        print(
            f"{row.schedule:7} {row.micro_batches:3} {row.update_s:9.3f} {span:>16}"
            f" {row.micro_batch_ms:15.1f} {row.ratio:11.3f} {row.ideal_ratio:6.3f}"
            f" {row.bubble:7.1%} {row.ideal_bubble:6.1%} {row.gap_points:+11.1f}"
        )
    steady_ms = {row.schedule: row.micro_batch_ms / row.ratio for row in rows}
    for schedule, milliseconds in steady_ms.items():
        print(f"a micro-batch of {schedule} in the steady state: {milliseconds:.1f} ms")
    sys.stdout.flush()
    return {
        "what": title,
        "steady_micro_batch_ms": steady_ms,
        "rows": [row._asdict() for row in rows],
        "measured": measured,
    }


def measure_memory(arguments: argparse.Namespace, device: str) -> Dict[str, Any]:
    """Measure the memory of both schedules, print a table, return the content of the JSON file."""
    words = (*FOR_MEMORY[device], f"engine.device={device}")
    measured = launch(arguments, words, environment=RETURN_MEMORY)
    by_schedule = {
        name: [case for case in measured if case["schedule"] == name] for name in SCHEDULES
    }
    if arguments.plain_stage:
        by_schedule[PLAIN] = launch(
            arguments, words, "--plain-stage", schedules=["1f1b"], environment=RETURN_MEMORY
        )
    rows = [row for name, cases in by_schedule.items() for row in memories(cases, name)]
    title = (
        f"peak of {'allocated GPU' if device == 'cuda' else 'resident'} memory, MB above that"
        f" before the first update, {' '.join(words[2:])}"
    )
    print(f"\n{title}")
    counts = sorted(arguments.micro_batches)
    heads = "".join(f"{f'M={count}':>9}" for count in counts)
    print(f"{'':12} {'stage':>5}{heads}   M={counts[-1]} over M={counts[0]}")
    for row in rows:
        peaks = "".join(f"{row.peak_mb[count]:9.1f}" for count in counts)
        print(f"{row.schedule:12} {row.stage:5}{peaks}   {row.growth:.2f}")
    sys.stdout.flush()
    return {"what": title, "rows": [row._asdict() for row in rows], "measured": by_schedule}


def verdict(memory: Dict[str, Any]) -> bool:
    """Print whether stages of 1F1B grow with M, and how much those of GPipe do."""
    growths: Dict[str, Dict[int, float]] = {}
    for row in memory["rows"]:
        growths.setdefault(row["schedule"], {})[row["stage"]] = row["growth"]
    growing = [f"stage {stage}" for stage, growth in growths["1f1b"].items() if growth > NO_GROWTH]
    of_gpipe = growths["gpipe"].values()
    print(
        f"1f1b's peak {'GROWS with M in ' + ', '.join(growing) if growing else 'does not grow'}"
        f" (growth is a ratio above {NO_GROWTH:g}; its largest is"
        f" {max(growths['1f1b'].values()):.2f}); gpipe's ratio is {min(of_gpipe):.2f} to"
        f" {max(of_gpipe):.2f}"
    )
    return not growing


def measure(arguments: argparse.Namespace, devices: Sequence[str]) -> Dict[str, Any]:
    """Measure everything; return the content of the JSON file."""
    cores, sleep = len(os.sched_getaffinity(0)), arguments.stage_ms
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    result: Dict[str, Any] = {
        **describe_machine("torch", "transformers"),
        "usable_cores": cores,
        "load_average": os.getloadavg()[0],
        "gpus": gpus,
        "stages": STAGES,
        "rounds": arguments.rounds,
    }
    print(
        f"{result['machine']}, {cores} cores (load average at the start"
        f" {result['load_average']:.1f}), torch {torch.__version__}, {STAGES} processes"
    )
    if len(gpus) < STAGES:
        print(f"not measured on GPUs: needs {STAGES}, found {len(gpus)}")
    result["asleep"] = measure_time(
        arguments,
        f"ASLEEP: each stage sleeps {sleep:g} ms forward and {2 * sleep:g} ms backward, over gloo:"
        f" at least {3 * sleep:g} ms per micro-batch",
        *(*ASLEEP, "engine.device=cpu", "--stage-ms", sleep),
    )
    uneven = [sleep, 2 * sleep, sleep, sleep]
    result["uneven"] = measure_time(
        arguments,
        f"UNEVEN: the stages sleep {uneven} ms forward and twice as long backward; 'ideal' is the"
        " planner's bubble",
        *(*ASLEEP, "engine.device=cpu", "--stage-ms", *uneven),
        sleeps_ms=uneven,
    )
    for device in devices:
        words = (*AT_WORK[device], f"engine.device={device}")
        where = f"{len(gpus)} GPUs" if device == "cuda" else f"{cores} cores"
        title = f"AT WORK: the stages compute on {where}, {' '.join(words[2:])}"
        if device == "cpu" and cores < STAGES:
            title += (
                f"\n{STAGES} stages share {cores} cores: while one waits, another uses its core, so"
                " the bubble does not show in full"
            )
        result[f"at_work_{device}"] = measure_time(arguments, title, *words)
        result[f"memory_{device}"] = measure_memory(arguments, device)
        result[f"memory_{device}"]["is_as_claimed"] = verdict(result[f"memory_{device}"])
    return result


def counts_of(text: str) -> List[int]:
    """Parse the numbers of micro-batches."""
    counts = sorted({int(word) for word in text.split(",")})
    if len(counts) < 2 or counts[0] < STAGES:
        raise argparse.ArgumentTypeError(
            f"{text}: needs two or more numbers, none below the {STAGES} stages that 1f1b must fill"
        )
    return counts


def main(argv: Sequence[str]) -> int:
    """Measure, print tables, write the JSON file; return 1 if the memory of 1F1B grows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--micro-batches", type=counts_of, default="4,8,16,32", metavar="M,M,...")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="one update per round")
    parser.add_argument(
        "--stage-ms", type=float, default=20, metavar="MS", help="sleep per forward"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help=f"default: CPU, and GPUs where there are {STAGES}"
    )
    parser.add_argument(
        "--plain-stage", action="store_true", help="measure 1f1b with torch's own stage as well"
    )
    parser.add_argument("--out", type=Path, default=Path("pipeline.json"), metavar="FILE")
    arguments = parser.parse_args(argv)
    gpus = torch.cuda.device_count()
    if arguments.device == "cuda" and gpus < STAGES:
        parser.error(f"--device cuda needs {STAGES} CUDA devices; found {gpus}")
    everywhere = ["cpu", "cuda"] if gpus >= STAGES else ["cpu"]
    devices = [arguments.device] if arguments.device else everywhere
    result = measure(arguments, devices)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(result[f"memory_{device}"]["is_as_claimed"] for device in devices) else 1


if __name__ == "__main__":
    run(main)
