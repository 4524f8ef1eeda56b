"""Compare sizes of the buckets in which DDP exchanges gradients, over processes of this machine.

    python -m benchmarks.ddp_buckets [--processes N] [--rounds N] [--out FILE]

Each size has a model of its own. The sizes take turns, so that other work on the machine slows all
of them. A step is one micro-batch, forward, backward and exchange: the case in which the exchange
weighs most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import describe_machine
from cxr_vit import ViTModule, load_config

#: MiB; torch's default is 25.
SIZES = (1, 5, 25, 100)
MODEL, SIDE, PATCH, MICRO_BATCH, STEPS = "vit-tiny", 64, 8, 8, 5
PORT = 29511
_OUT = Path(__file__).parent / "results" / "ddp_buckets.json"


def _worker(rank: int, processes: int, rounds: int, path: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{PORT}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    models = {size: _parallel(size) for size in SIZES}
    images = torch.randint(0, 256, (MICRO_BATCH, 1, SIDE, SIDE), dtype=torch.uint8)
    seconds: Dict[int, List[float]] = {size: [] for size in SIZES}
    for number in range(rounds + 1):  # the first warms up
        for size in SIZES[number % len(SIZES) :] + SIZES[: number % len(SIZES)]:
            took = _steps(models[size], images)
            if number:
                seconds[size].append(took)
    if rank == 0:
        Path(path).write_text(json.dumps(seconds), encoding="utf-8")
    dist.destroy_process_group()


def _parallel(size: int) -> DistributedDataParallel:
    overrides = [f"model.name={MODEL}", f"model.patch_size={PATCH}", f"data.image_size={SIDE}"]
    overrides.append("pipeline.layers_per_stage=[12]")
    module = ViTModule(load_config("vit_demo", overrides))
    module.setup()
    return DistributedDataParallel(module.model, bucket_cap_mb=size, gradient_as_bucket_view=True)


def _steps(model: DistributedDataParallel, images: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
    return (time.perf_counter() - start) / STEPS


def main() -> int:
    """Measure, print the ratios to torch's default, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    raw = arguments.out.with_suffix(".raw")
    mp.spawn(_worker, (arguments.processes, arguments.rounds, str(raw)), arguments.processes)
    seconds = json.loads(raw.read_text(encoding="utf-8"))
    raw.unlink()
    results: Dict[str, Any] = {
        **{"model": MODEL, "image_size": SIDE, "patch_size": PATCH, "images": MICRO_BATCH},
        **{"processes": arguments.processes, "rounds": arguments.rounds},
    }
    for size, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(values, seconds["25"]))
        results[size] = {
            "step_ms": round(1000 * statistics.median(values), 1),
            "of_default": round(statistics.median(ratios), 3),
            "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3),
        }
        print(size, "MiB:", results[size])
    content = {
        "command": "python -m benchmarks.ddp_buckets",
        **describe_machine("torch", "transformers"),
        "results": results,
    }
    arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
