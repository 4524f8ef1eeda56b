"""One stage of a pipeline, timed and weighed: benchmarks.pipeline starts four of it with torchrun.

    torchrun --nproc-per-node 4 -m benchmarks.pipeline_worker --out FILE [section.key=value ...]

Each case, a schedule and a number of micro-batches an update, is a pipeline engine of its own; the
cases take turns over several rounds. The first process writes what all of them measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from pathlib import Path
from typing import Any, Dict, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from cxr_vit.cli import run
from cxr_vit.config import BatchPlan, Config, check, load_config
from cxr_vit.data.dataset import Batch
from cxr_vit.data.labels import FINDINGS
from cxr_vit.engines import pipeline_engine
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.processes import Launch
from cxr_vit.model.stages import StagedViT

LEARNING_RATE = 1e-4


class PlainStage(PipelineStage):
    """torch's own stage, as it is."""

    awaited: Dict[Any, str] = {}  # noqa: RUF012  (what it waits for is not known)
    last_send = ""


class Memory:
    """The most memory since it was made: allocated on a GPU, resident on a CPU (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        self.held_mb = self.peak_mb()

    def peak_mb(self) -> float:
        """Return the peak, what was held before included."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None, status
        return int(found.group(1)) * 1024 / 1e6


def sleep_in(stage: nn.Module, seconds: float) -> None:
    """Let a stage sleep each time it has run forward, and twice as long before it runs backward."""

    def forward(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        time.sleep(seconds)
        output.register_hook(lambda _gradient: time.sleep(2 * seconds))

    stage.register_forward_hook(forward)


def make_batch(config: Config, *, reads_images: bool) -> Batch:
    """Make the images of an update: noise, with findings by chance."""
    size = config.batch.micro_batch_size * config.batch.gradient_accumulation
    side = config.data.image_size if reads_images else 0
    generator = torch.Generator().manual_seed(config.run.seed)
    return Batch(
        torch.randint(0, 256, (size, 1, side, side), dtype=torch.uint8, generator=generator),
        torch.randint(0, 2, (size, len(FINDINGS)), generator=generator).float(),
        torch.arange(size),
    )


def measure(config: Config, arguments: argparse.Namespace) -> Dict[str, Any]:
    """Make updates with a new engine; return their seconds, and each stage's memory.

    The memory is that of everything from the first micro-batch on: connections, buffers,
    activations, gradients, the optimizer's state. Weights and images were there before.
    """
    model = StagedViT.from_config(config, names=FINDINGS, prevalence=np.full(len(FINDINGS), 0.5))
    launch = Launch.from_environment()
    choice, plan = choose_engine(config, launch), BatchPlan.from_section(config.batch)
    with build_engine(config, model, choice, plan, launch) as engine:
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
            engine.train_step(batch, lr=LEARNING_RATE)  # ends with an exchange between all
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
    """Measure all cases in turns and write them."""
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
        help="slept forward, by every stage, or a number each",
    )
    parser.add_argument("--plain-stage", action="store_true", help="without LeanStage")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.plain_stage:
        pipeline_engine.LeanStage = PlainStage
    cases = [
        check(
            load_config(
                [],
                [
                    *arguments.overrides,
                    f"pipeline.schedule={schedule}",
                    f"batch.gradient_accumulation={count}",
                ],
            )
        )
        for count in arguments.micro_batches
        for schedule in arguments.schedules
    ]
    measure(cases[0], arguments)  # the first engine of a process loads libraries
    measured = [measure(case, arguments) for _ in range(arguments.rounds) for case in cases]
    if Launch.from_environment().is_main:
        arguments.out.write_text(json.dumps(measured), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
