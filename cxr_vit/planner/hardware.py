"""Devices to plan for, and published measurements, each number with its source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Optional, Tuple

from cxr_vit.config import Config


class Sourced(NamedTuple):
    """A number and its source."""

    value: float
    source: str


class Ipu(NamedTuple):
    """Numbers of an IPU: bytes, hertz, operations per second and bytes per second.

    Each of the `tiles` has its own part of the memory. `exchange_bandwidth` is that between tiles,
    `streaming_bandwidth` that of the memory beside the chip, which may hold the moments.
    """

    name: str
    tiles: Sourced
    tile_bytes: Sourced
    clock_hz: Sourced
    fp16_flops: Sourced
    fp32_flops: Sourced
    memory_bandwidth: Sourced
    exchange_bandwidth: Sourced
    link_bandwidth: Sourced
    host_bandwidth: Sourced
    streaming_bandwidth: Sourced

    @property
    def memory_bytes(self) -> float:
        """Memory on the chip, bytes."""
        return self.tiles.value * self.tile_bytes.value

    def peak_flops(self, precision: str) -> float:
        """Return the peak in ``"fp32"`` or ``"fp16"``, operations per second."""
        return self.fp32_flops.value if precision == "fp32" else self.fp16_flops.value


#: IPUs that share a machine and its link to the host (Bow-2000 datasheet).
IPUS_PER_MACHINE = 4
_CLOCK = "commonly quoted, in no datasheet; the two clocks have the ratio of the fp16 peaks"
_MK2 = Ipu(
    name="Mk2 IPU (GC200)",
    tiles=Sourced(1472, "Bow-2000 datasheet: 5,888 processor cores on four IPUs"),
    tile_bytes=Sourced(
        638_976,
        "graphcore/popliner, parse_args.py, --mem-per-tile; graphcore/popart,"
        " available_memory_proportion_test.py:160",
    ),
    clock_hz=Sourced(1.325e9, _CLOCK),
    fp16_flops=Sourced(250e12, "cambrian-ai.com, Graphcore's second generation IPU, 2020"),
    fp32_flops=Sourced(62.5e12, "cambrian-ai.com, Graphcore's second generation IPU, 2020"),
    memory_bandwidth=Sourced(47.5e12, "thecharlieblake.co.uk/ipus: In-Processor-Memory, 47.5 TB/s"),
    exchange_bandwidth=Sourced(8e12, "thecharlieblake.co.uk/ipus: IPU-Exchange, 8 TB/s"),
    link_bandwidth=Sourced(320e9, "thecharlieblake.co.uk/ipus: IPU-Links, 320 GB/s per IPU"),
    host_bandwidth=Sourced(
        12.5e9, "Bow-2000 datasheet: 100 Gb/s RoCEv2 NIC, shared by its four IPUs"
    ),
    streaming_bandwidth=Sourced(12.5e9, "assumed for each IPU: no figure is published (100 Gb/s)"),
)
_BOW = _MK2._replace(
    name="Bow IPU",
    clock_hz=Sourced(1.85e9, _CLOCK),
    fp16_flops=Sourced(350e12, "Bow-2000 datasheet: 1.4 petaFLOPS FP16.16 on four IPUs"),
    fp32_flops=Sourced(87.5e12, "the Mk2's, by the ratio of the fp16 peaks"),
    exchange_bandwidth=Sourced(11.17e12, "the Mk2's, by the ratio of the clocks"),
)
#: `planner.hardware` -> IPU.
IPUS = {"mk2": _MK2, "bow": _BOW}


class Target(NamedTuple):
    """Engine, device and precision that a plan is for.

    `kind` is IPU, GPU or CPU. `name` is ``"GPU"`` for a GPU that is not in this machine.
    `precision` is ``"auto"`` if only the machine of the run decides. `memory_bytes` is per device,
    or per process on CPUs; None if unknown. `ipu` is None for other devices.
    """

    engine: str
    kind: str
    name: str
    precision: str
    memory_bytes: Optional[float] = None
    memory_source: str = ""
    ipu: Optional[Ipu] = None

    @property
    def place(self) -> str:
        """What a stage runs on."""
        return "process" if self.kind == "CPU" else self.kind

    @property
    def is_fp32(self) -> bool:
        """Whether activations are counted as fp32; on a CPU also for ``"auto"``."""
        return self.precision == "fp32" or (self.precision == "auto" and self.kind == "CPU")

    def of(self, devices: int) -> str:
        """Name a number of devices."""
        if self.kind == "CPU":
            return f"CPU, {devices} process{'es' * (devices > 1)}"
        return f"{devices} x {self.name}"

    def describe(self) -> str:
        """Name engine, device and precision."""
        precision = "any precision" if self.precision == "auto" else self.precision
        return f"engine {self.engine} on {self.name} in {precision}"


def find_target(config: Config, engine: Optional[str] = None) -> Target:
    """Return what a configuration is planned for.

    `planner.hardware` wins, then the engine that was chosen; None for `engine.name`. For the torch
    and pipeline engines the device is this machine's own; its memory is `planner.device_memory_gib`
    or read from it. torch is imported only if a GPU may be there.
    """
    name, hardware = engine or config.engine.name, config.planner.hardware
    if name == "auto" and config.engine.device != "auto":
        name = "torch"
    if name in ("auto", "poptorch") or hardware != "auto":
        return make_target("poptorch", "IPU", config.engine.precision, hardware)
    given, device = config.planner.device_memory_gib, config.engine.device
    gpu = None if device == "cpu" or (device == "cuda" and given) else _read_gpu()
    is_cpu = device == "cpu" or (device == "auto" and gpu is None)
    target = make_target(name, "CPU" if is_cpu else "GPU", config.engine.precision)
    if given:
        source = "planner.device_memory_gib"
        return target._replace(memory_bytes=given * 2**30, memory_source=source)
    if is_cpu:
        stages = len(config.pipeline.layers_per_stage) if name == "pipeline" else 1
        processes = stages * config.batch.replicas
        source = "read from this machine"
        if processes > 1:
            source += f", divided by {processes} processes"
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes
        return target._replace(memory_bytes=memory, memory_source=source)
    if gpu is None:
        return target
    gpu_name, memory = gpu
    return target._replace(
        name=gpu_name, memory_bytes=memory, memory_source="read from this machine"
    )


def make_target(engine: str, device: str, precision: str, hardware: str = "auto") -> Target:
    """Return the target of an engine, of a device's name and of `planner.hardware`."""
    if engine != "poptorch":
        return Target(engine, device if device == "CPU" else "GPU", device, precision)
    ipu = IPUS["mk2" if hardware == "auto" else hardware]
    own = "fp32" if precision == "fp32" else "fp16"
    return Target(engine, "IPU", ipu.name, own, ipu.memory_bytes, ipu.tile_bytes.source, ipu)


#: Device files of GPU drivers: NVIDIA's, AMD's, and Windows' for Linux.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def _read_gpu() -> Optional[Tuple[str, float]]:
    """Return name and memory, bytes, of the first GPU that torch can use, or None."""
    if not any(Path(driver).exists() for driver in _DRIVERS):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, float(properties.total_memory)


class PublishedRun(NamedTuple):
    """A published training of ViT-B/16 at 224 pixels on IPUs.

    `settings` are overrides of a configuration; `image_bytes` cross to the device per image. The
    constants of the speed are fitted to the runs with `is_fitted`.
    """

    what: str
    hardware: str
    settings: Tuple[str, ...]
    samples_per_s: float
    source: str
    is_fitted: bool
    note: str = ""
    image_bytes: int = 3 * 224 * 224 * 2  # fp16, RGB


_BASE = (
    "model.name=vit-base",
    "model.patch_size=16",
    "data.image_size=224",
    "pipeline.layers_per_stage=[3,3,3,3]",
    "pipeline.recompute=every_layer",
    "pipeline.available_memory_proportion=0.3",
    "engine.name=poptorch",
    "engine.precision=fp16",
    "engine.weights=fp16",
    "batch.eval_device_iterations=4",
)
_POD16 = (*_BASE, "batch.replicas=4", "engine.replicated_tensor_sharding=true")

#: Graphcore's tutorial, with the settings that its log prints.
TUTORIAL = PublishedRun(
    what="Graphcore's tutorial (ChestX-ray14, four IPUs)",
    hardware="mk2",
    settings=(
        *_BASE,
        "batch.gradient_accumulation=128",
        "optim.accumulator=fp16",
        "optim.first_moment=fp16",
        "engine.optimizer_state_on_chip=false",
    ),
    samples_per_s=307.745,
    source="graphcore/examples, tutorials/pytorch/vit_model_training, the printed log; it does not"
    " name the machine, a Mk2 is assumed",
    is_fitted=False,
    note="most likely limited by its host: eight workers decoded full-size PNGs, and its"
    " evaluation, forward passes only, ran no faster (262 to 276 samples/s); it also kept the"
    " moments off the chip",
)

PUBLISHED: Tuple[PublishedRun, ...] = (
    PublishedRun(
        what="fine-tuning, Bow Pod16, 17 x 30 x 4",
        hardware="bow",
        settings=(
            *_POD16,
            "batch.micro_batch_size=17",
            "batch.gradient_accumulation=30",
            "optim.name=sgd",
            "optim.accumulator=fp16",
            "optim.first_moment=fp16",
        ),
        samples_per_s=7319,
        source="graphcore.cn/performance-results, SDK 3.0 (batch 2,040); the recipe:"
        " graphcore/examples, vision/vit/pytorch/configs.yml, b16_imagenet1k",
        is_fitted=True,
    ),
    PublishedRun(
        what="pre-training, Bow Pod16, 8 x 2048 x 4",
        hardware="bow",
        settings=(
            *_POD16,
            "batch.micro_batch_size=8",
            "batch.gradient_accumulation=2048",
            "optim.name=lamb",
        ),
        samples_per_s=7615,
        source="graphcore.cn/performance-results, SDK 3.0 (batch 65,536); the recipe:"
        " graphcore/examples, vision/vit/pytorch/configs.yml, b16_in1k_pretrain_lamb",
        is_fitted=True,
    ),
    TUTORIAL,
)

#: Estimates that hold for all IPUs or hosts.
ESTIMATES = {
    # Vertex code and state, exchange and control code of a training stage.
    "code_bytes": Sourced(
        70e6,
        "estimated, 50 to 90 MB: graphcore/popliner, tests/test_popart_bert_inf.py, has 50 to 55 MB"
        " for BERT in inference; a repeated layer is outlined, so the code hardly grows with their"
        " number",
    ),
    "eval_code_bytes": Sourced(
        55e6,
        "graphcore/popliner, tests/test_popart_bert_inf.py: 50 to 55 MB for BERT in inference",
    ),
    # Memory of the fullest tile over the mean of what is counted.
    "imbalance": Sourced(
        1.33,
        "fitted: the largest published micro-batch of this model on four IPUs is 17"
        " (graphcore/examples, configs.yml, b16_imagenet1k); from 1.31 to 1.34 17 fits and 18 does"
        " not",
    ),
    # PopLibs' own memory proportion, used if none is given.
    "default_proportion": Sourced(
        0.6, "graphcore/examples, vision/unet_medical/tensorflow2/README.md"
    ),
    # Images per second that a core decodes and resizes, and that a loader process reads from the
    # cache.
    "decoded_per_s": Sourced(
        142, "benchmarks.data_loading, README: data.cache=off, per core (AMD EPYC)"
    ),
    "cached_per_s": Sourced(
        25_000, "benchmarks.data_loading, README: the cache, one loader process, 224 pixels"
    ),
}
#: Error of the predicted memory, as a share of it, either way.
MEMORY_UNCERTAINTY = 0.10
#: Least error of a predicted speed, as a share of it, either way: the published recipes differ from
#: each other and from ours.
SPEED_UNCERTAINTY = 0.05
