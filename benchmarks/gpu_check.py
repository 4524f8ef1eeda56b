"""Check on a GPU what only a GPU shows, in two minutes.

    python -m benchmarks.gpu_check [--device cuda]

Prints the kernel of the attention, how often the host waits for the device within a step, and the
losses of a few steps: in fp32 against those of the CPU and of a second run, in bf16 and compiled
against fp32. Writes a JSON file. With --device cpu all of it runs on a small model, to try the
script. The exit status is 1 if an fp32 loss differs by more than 1e-4 from that of the CPU, or
between two runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe_machine
from cxr_vit import Batch, Config, ViTModule, load_config
from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import EngineSection
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.processes import Launch
from cxr_vit.engines.torch_engine import TorchEngine

#: On a GPU, and on a CPU.
MODELS = {
    "cuda": ["model.name=vit-base", "data.image_size=224", "pipeline.layers_per_stage=[12]"],
    "cpu": [
        "model.name=vit-micro",
        "model.patch_size=8",
        "data.image_size=32",
        "pipeline.layers_per_stage=[4]",
    ],
}
STEPS, SAMPLES = 6, 8
#: What torch's function for attention calls, and the kernels of a GPU.
_ATTENTION = ("aten::_scaled_dot_product_", "flash", "fmha", "cudnn_generated")
MOST_DIFFERENCE = 1e-4


def config_of(device: str, kind: str, precision: str, compile: str = "off") -> Config:
    """Return the configuration of a run on `device` with the model for a device of `kind`."""
    batch = [f"batch.micro_batch_size={SAMPLES // 2}", "batch.gradient_accumulation=2"]
    engine = ["engine.name=torch", f"engine.device={device}", f"engine.precision={precision}"]
    if compile != "off":
        engine.append(f"engine.compile={compile}")
    return load_config([], [*MODELS[kind], *batch, *engine, "optim.max_grad_norm=1.0"])


def engine_of(config: Config) -> TorchEngine:
    """Build the engine of a new model."""
    module, launch = ViTModule(config), Launch()
    module.setup()
    batch = BatchPlan.from_section(config.batch)
    engine = build_engine(config, module, choose_engine(config, launch), batch, launch)
    assert isinstance(engine, TorchEngine)
    return engine


def batch_of(config: Config, seed: int) -> Batch:
    """Return a host batch of noise, as the loader does: pinned if there is a GPU."""
    generator, side = torch.Generator().manual_seed(seed), config.data.image_size
    images = torch.randint(0, 256, (SAMPLES, 1, side, side), dtype=torch.uint8, generator=generator)
    labels = (torch.rand(SAMPLES, 14, generator=generator) < 0.2).float()
    if torch.cuda.is_available():
        images, labels = images.pin_memory(), labels.pin_memory()
    return Batch(images, labels, torch.arange(SAMPLES))


def losses_of(config: Config) -> List[float]:
    """Return the losses of the first steps."""
    engine = engine_of(config)
    engine.compile(batch_of(config, 0))
    batches = (batch_of(config, step) for step in range(STEPS))
    outputs = [engine.train_step(batch, lr=1e-3) for batch in batches]
    return [loss for output in outputs for loss in output.losses.tolist()]


def attention_of(config: Config) -> List[str]:
    """Return the names of what computes the attention of a training step."""
    engine = engine_of(config)
    engine.train_step(batch_of(config, 0), lr=1e-3).wait()
    activities = [ProfilerActivity.CPU]
    if config.engine.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        engine.train_step(batch_of(config, 1), lr=1e-3).wait()
    names = {event.key for event in profiler.key_averages()}
    return sorted(name for name in names if any(word in name for word in _ATTENTION))


def waits_of(config: Config) -> int:
    """Return how often the host waits for the GPU within a step."""
    engine = engine_of(config)
    batch = batch_of(config, 0)
    engine.train_step(batch, lr=1e-3).wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output = engine.train_step(batch, lr=1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    output.wait()
    return len([warning for warning in caught if "synchroniz" in str(warning.message)])


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference of two lists of losses."""
    return max(abs(a - b) for a, b in zip(one, other))


def main(argv: Sequence[str]) -> int:
    """Print what was found and write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=tuple(MODELS), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), metavar="FILE")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    exact, mixed = (config_of(device, device, precision) for precision in ("fp32", "bf16"))
    dropped = mixed.model_copy(update={"model": mixed.model.model_copy(update={"drop_path": 0.1})})
    on_cpu, first, second = (
        losses_of(config_of("cpu", device, "fp32")),
        *map(losses_of, [exact] * 2),
    )
    found: Dict[str, object] = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        **describe_machine("torch", "transformers", "numpy"),
        "attention_bf16": attention_of(mixed),
        "attention_fp32": attention_of(exact),
        "waits_in_a_step": waits_of(mixed) if device == "cuda" else 0,
        "waits_with_drop_path": waits_of(dropped) if device == "cuda" else 0,
        "fp32_repeats": first == second,
        "fp32_from_cpu": difference(first, on_cpu),
        "bf16_from_fp32": difference(losses_of(mixed), first),
    }
    if "compile" in EngineSection.model_fields:
        for how in ("layers", "whole"):
            compiled = losses_of(config_of(device, device, "fp32", how))
            found[f"{how}_from_fp32"] = difference(compiled, first)
    for name, value in found.items():
        print(f"{name:20} {value}")
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    is_right = first == second and difference(first, on_cpu) <= MOST_DIFFERENCE
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
