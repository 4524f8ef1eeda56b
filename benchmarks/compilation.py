"""What `engine.compile` costs and gains: ViT-Ti/8, 64 pixels, micro-batches of 32, fp32.

python -m benchmarks.compilation
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Dict, List

import torch

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
ROUNDS, STEPS = 7, 3


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


def compile_seconds(how: str) -> float:
    """Return the seconds of the first pass in a process of its own, with the present cache."""
    words = [sys.executable, "-m", "benchmarks.compilation", how]
    return float(subprocess.check_output(words, encoding="utf-8").split()[-1])


def step_seconds() -> Dict[str, List[float]]:
    """Return the seconds of a step, of which each round has some of each way."""
    engines = {how: engine_of(how) for how in HOW}
    for engine in engines.values():
        engine.compile(batch())
    seconds: Dict[str, List[float]] = {how: [] for how in HOW}
    for _ in range(ROUNDS):
        for how, engine in engines.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                engine.train_step(batch(), lr=1e-4)
            seconds[how].append((time.perf_counter() - start) / STEPS)
    return seconds


def main() -> None:
    """Print a line for each way; with one as the argument, only the seconds of its first pass."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if sys.argv[1:]:
        print(engine_of(sys.argv[1]).compile(batch()))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        first = {how: [compile_seconds(how) for _ in range(2)] for how in HOW}
        seconds = step_seconds()
    for how in HOW:
        ratios = [plain / own for plain, own in zip(seconds["off"], seconds[how])]
        print(
            f"{how:6} first pass {first[how][0]:5.1f} s, again {first[how][1]:5.1f} s;"
            f" {1 / statistics.median(seconds[how]):.2f} steps/s,"
            f" {statistics.median(ratios):.3f} times off"
            f" ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
