"""Measure time and memory of one pipeline stage; benchmarks.pipeline starts four with torchrun.

    torchrun --nproc-per-node 4 -m benchmarks.pipeline_worker --out FILE [section.key=value ...]

Each case, a schedule and a number of micro-batches per update, builds a pipeline engine of its own;
the cases are interleaved over several rounds. Rank 0 writes the measurements of all ranks.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from pathlib import Path
from typing import Any, Dict, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from cxr_vit.cli import run
from cxr_vit.config import BatchPlan, Config, load_config
from cxr_vit.data.dataset import Batch
from cxr_vit.data.labels import FINDINGS
from cxr_vit.engines import pipeline_engine
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.processes import Launch
from cxr_vit.model.module import ViTModule

LEARNING_RATE = 1e-4


class PlainStage(PipelineStage):
    """torch's own stage."""

    awaited: Dict[Any, str] = {}  # noqa: RUF012  (it does not record what it waits for)
    last_send = ""


class Memory:
    """Peak memory since construction: allocated on a GPU, resident on a CPU (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        self.held_mb = self.peak_mb()

    def peak_mb(self) -> float:
        """Return the peak, including the memory held before."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None, status
        return int(found.group(1)) * 1024 / 1e6


def sleep_in(stage: nn.Module, seconds: float) -> None:
    """Make a stage sleep after each forward, and twice as long before each backward."""

    def forward(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        time.sleep(seconds)
        output.register_hook(lambda _gradient: time.sleep(2 * seconds))

    stage.register_forward_hook(forward)


def make_batch(config: Config, *, reads_images: bool) -> Batch:
    """Make the images and labels of one update at random."""
    size = config.batch.micro_batch_size * config.batch.gradient_accumulation
    side = config.data.image_size if reads_images else 0
    generator = torch.Generator().manual_seed(config.run.seed)
    return Batch(
        torch.randint(0, 256, (size, 1, side, side), dtype=torch.uint8, generator=generator),
        torch.randint(0, 2, (size, len(FINDINGS)), generator=generator).float(),
        torch.arange(size),
    )


def measure(config: Config, launch: Launch, arguments: argparse.Namespace) -> Dict[str, Any]:
    """Run updates with a new engine; return their seconds, and the memory of each stage.

    The memory counts what is allocated from the first micro-batch on: connections, buffers,
    activations, gradients, optimizer state. Weights and images are allocated before.
    """
    module = ViTModule(config)
    module.setup()
    choice, plan = choose_engine(config, launch), BatchPlan.from_section(config.batch)
    with build_engine(config, module, choice, plan, launch) as engine:
        assert isinstance(engine, pipeline_engine.PipelineEngine)
        for index in engine.own_stages:
            sleep_ms = arguments.stage_ms[index % len(arguments.stage_ms)]
            if sleep_ms:
                sleep_in(engine.model.stage(index), sleep_ms / 1000)
        batch = make_batch(config, reads_images=engine.reads_images)
        memory = Memory(engine.device)
        engine.compile(batch)
        seconds = []
        for _ in range(arguments.warm_steps + arguments.steps):
            start = time.perf_counter()
            engine.train_step(batch, lr=LEARNING_RATE)  # ends with a collective of all ranks
            seconds.append(time.perf_counter() - start)
        own = torch.tensor([[memory.held_mb, memory.peak_mb()]], dtype=torch.float64)
        (stages,) = engine.group.concatenate((own,))
    return {
        "schedule": config.pipeline.schedule,
        "micro_batches": config.batch.gradient_accumulation,
        "seconds": seconds[arguments.warm_steps :],
        "held_mb": stages[:, 0].tolist(),
        "peak_mb": (stages[:, 1] - stages[:, 0]).tolist(),
    }


def main(argv: Sequence[str]) -> int:
    """Measure all cases in interleaved rounds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument("--schedules", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--micro-batches", nargs="+", type=int, required=True, metavar="M")
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument("--warm-steps", type=int, default=0, metavar="N", help="not timed")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="timed, each round")
    parser.add_argument(
        "--stage-ms",
        nargs="+",
        type=float,
        default=[0.0],
        metavar="MS",
        help="sleep per forward, of every stage or one number per stage",
    )
    parser.add_argument("--plain-stage", action="store_true", help="without LeanStage")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.plain_stage:
        pipeline_engine.LeanStage = PlainStage
    cases = [
        load_config(
            [],
            [
                *arguments.overrides,
                f"pipeline.schedule={schedule}",
                f"batch.gradient_accumulation={count}",
            ],
        )
        for count in arguments.micro_batches
        for schedule in arguments.schedules
    ]
    launch = Launch.from_environment()
    measure(cases[0], launch, arguments)  # the first engine of a process loads libraries
    measured = [measure(case, launch, arguments) for _ in range(arguments.rounds) for case in cases]
    if launch.is_main:
        arguments.out.write_text(json.dumps(measured), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
