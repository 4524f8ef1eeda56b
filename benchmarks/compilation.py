"""What `engine.compile` costs and gains: ViT-Ti/8, 64 pixels, micro-batches of 32, fp32.

    python -m benchmarks.compilation [--rounds 2] [--steps 1]

Prints a line for each value and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch

from benchmarks.machine import describe_machine
from benchmarks.throughput import command_of, ratios
from cxr_vit.cli import run
from cxr_vit.config import BatchPlan, load_config
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.base import Engine
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.processes import Launch
from cxr_vit.model.module import ViTModule

HOW = ("off", "layers", "whole")
OVERRIDES = (
    "model.name=vit-tiny",
    "model.patch_size=8",
    "data.image_size=64",
    "pipeline.layers_per_stage=[12]",
    "batch.micro_batch_size=32",
    "batch.gradient_accumulation=1",
    "engine.device=cpu",
    "engine.precision=fp32",
)


def engine_of(how: str) -> Engine:
    """Build the engine of one value of `engine.compile`."""
    config = load_config([], [*OVERRIDES, f"engine.compile={how}"])
    module = ViTModule(config)
    module.setup()
    choice = choose_engine(config, Launch())
    return build_engine(config, module, choice, BatchPlan.from_section(config.batch), Launch())


def batch() -> Batch:
    """Return one random micro-batch."""
    pixels = torch.randint(0, 256, (32, 1, 64, 64), dtype=torch.uint8)
    return Batch(pixels, torch.randint(0, 2, (32, 14)).float(), torch.arange(32))


def compile_seconds(how: str, threads: int) -> float:
    """Return the seconds of the first pass in a process of its own, with the present cache."""
    words = ["-m", "benchmarks.compilation", "--threads", str(threads), "--first-pass", how]
    return float(subprocess.check_output([sys.executable, *words], encoding="utf-8").split()[-1])


def step_seconds(caches: Dict[str, Path], rounds: int, steps: int) -> Dict[str, List[float]]:
    """Return the seconds of a step, of which each round has some of each way."""
    engines = {how: engine_of(how) for how in HOW}
    for how, engine in engines.items():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(caches[how])
        engine.compile(batch())
        engine.train_step(batch(), lr=1e-4)
    seconds: Dict[str, List[float]] = {how: [] for how in HOW}
    for _ in range(rounds):
        for how, engine in engines.items():
            start = time.perf_counter()
            for _ in range(steps):
                engine.train_step(batch(), lr=1e-4)
            seconds[how].append((time.perf_counter() - start) / steps)
    return seconds


def measure(threads: int, rounds: int, steps: int, folder: Path) -> Dict[str, Dict[str, Any]]:
    """Return the figures of each value of `engine.compile`."""
    # A cache for each: some of what the first compilation writes would serve all.
    caches = {how: folder / how for how in HOW}
    first: Dict[str, List[float]] = {}
    for how in HOW:
        print(f"first passes: {how}", file=sys.stderr, flush=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(caches[how])
        first[how] = [compile_seconds(how, threads) for _ in range(2)]
    print("steps", file=sys.stderr, flush=True)
    speeds = {
        how: [1 / one for one in found]
        for how, found in step_seconds(caches, rounds, steps).items()
    }
    return {
        how: {
            "first_pass_s": round(first[how][0], 1),
            "first_pass_again_s": round(first[how][1], 1),
            "steps_per_s": round(statistics.median(speeds[how]), 3),
            "speed_to_that_of_off": ratios(speeds[how], speeds["off"]),
        }
        for how in HOW
    }


def main(argv: Sequence[str]) -> int:
    """Print a line for each value and write the JSON file; return the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    add("--rounds", type=int, default=7, metavar="N")
    add("--steps", type=int, default=3, metavar="N", help="timed steps per round")
    add("--out", type=Path, default=Path("compilation.json"), metavar="FILE")
    add("--first-pass", choices=HOW, help="print only the seconds of the first pass")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.first_pass:
        print(engine_of(arguments.first_pass).compile(batch()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments.threads, arguments.rounds, arguments.steps, Path(folder))
    command = command_of(argv, "compilation")
    written = {"command": command, **describe_machine("torch", "transformers"), "results": results}
    arguments.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    for how, figures in results.items():
        speed = figures["speed_to_that_of_off"]
        print(
            f"{how:6} first pass {figures['first_pass_s']:5.1f} s,"
            f" again {figures['first_pass_again_s']:5.1f} s;"
            f" {figures['steps_per_s']:.2f} steps/s, {speed['median']:.3f} times off"
            f" ({speed['lowest']:.3f} to {speed['highest']:.3f})"
        )
    return 0


if __name__ == "__main__":
    run(main)
