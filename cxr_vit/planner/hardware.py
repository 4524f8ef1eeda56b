"""The devices that can be planned for, and what others have measured on them, each with its source.

"peers" in a source is a study of public systems for the same job; the place it names is the
original. Imports no torch.
"""

from __future__ import annotations

from typing import Dict, NamedTuple, Tuple

__all__ = [
    "CACHED_PER_S",
    "CODE_BYTES",
    "DECODED_PER_S",
    "DEFAULT_PROPORTION",
    "HARDWARE",
    "IMBALANCE",
    "IPUS_A_MACHINE",
    "MEMORY_UNCERTAINTY",
    "PUBLISHED",
    "SPEED_UNCERTAINTY",
    "TUTORIAL",
    "Hardware",
    "PublishedRun",
    "Sourced",
]


class Sourced(NamedTuple):
    """A number, and where it is from."""

    value: float
    source: str


class Hardware(NamedTuple):
    """A device; bytes, hertz, operations and bytes a second.

    `tiles` share the memory out on an IPU, and each has its own part; a GPU counts as one.
    `streaming_bandwidth` is that of the memory beside an IPU, where moments may lie.
    """

    name: str
    is_ipu: bool
    tiles: Sourced
    tile_bytes: Sourced
    clock_hz: Sourced
    fp16_flops: Sourced
    fp32_flops: Sourced
    memory_bandwidth: Sourced
    link_bandwidth: Sourced
    host_bandwidth: Sourced
    streaming_bandwidth: Sourced

    @property
    def memory_bytes(self) -> float:
        """The device's own memory, bytes."""
        return self.tiles.value * self.tile_bytes.value

    def peak_flops(self, precision: str) -> float:
        """Return the peak in ``"fp32"`` or any 16-bit arithmetic, operations a second."""
        return self.fp32_flops.value if precision == "fp32" else self.fp16_flops.value


_TILES = Sourced(1472, "Bow-2000 datasheet: 5,888 processor cores on four IPUs")
_TILE_BYTES = Sourced(
    638_976,
    "graphcore/popliner, parse_args.py, --mem-per-tile; graphcore/popart,"
    " available_memory_proportion_test.py:160",
)
_IPU_LINK = Sourced(320e9, "thecharlieblake.co.uk/ipus: IPU-Links, 320 GB/s an IPU")
_IPU_HOST = Sourced(12.5e9, "Bow-2000 datasheet: 100 Gb/s RoCEv2 NIC, shared by its four IPUs")
_STREAMING = Sourced(12.5e9, "assumed for each IPU: no figure is published (100 Gb/s)")
#: IPUs that share a machine and its link to the host (Bow-2000 datasheet).
IPUS_A_MACHINE = 4
_ON_CHIP = Sourced(47.5e12, "thecharlieblake.co.uk/ipus: In-Processor-Memory, 47.5 TB/s")

HARDWARE: Dict[str, Hardware] = {
    "mk2": Hardware(
        name="Mk2 IPU (GC200)",
        is_ipu=True,
        tiles=_TILES,
        tile_bytes=_TILE_BYTES,
        clock_hz=Sourced(1.325e9, "peers: general knowledge; agrees with the ratio of the peaks"),
        fp16_flops=Sourced(250e12, "cambrian-ai.com, Graphcore's second generation IPU, 2020"),
        fp32_flops=Sourced(62.5e12, "cambrian-ai.com, Graphcore's second generation IPU, 2020"),
        memory_bandwidth=_ON_CHIP,
        link_bandwidth=_IPU_LINK,
        host_bandwidth=_IPU_HOST,
        streaming_bandwidth=_STREAMING,
    ),
    "bow": Hardware(
        name="Bow IPU",
        is_ipu=True,
        tiles=_TILES,
        tile_bytes=_TILE_BYTES,
        clock_hz=Sourced(1.85e9, "peers: general knowledge; agrees with the ratio of the peaks"),
        fp16_flops=Sourced(350e12, "Bow-2000 datasheet: 1.4 petaFLOPS FP16.16 on four IPUs"),
        fp32_flops=Sourced(87.5e12, "the Mk2's, by the ratio of the fp16 peaks"),
        memory_bandwidth=_ON_CHIP,
        link_bandwidth=_IPU_LINK,
        host_bandwidth=_IPU_HOST,
        streaming_bandwidth=_STREAMING,
    ),
    "gpu": Hardware(
        name="GeForce RTX 3090",
        is_ipu=False,
        tiles=Sourced(1, "a GPU's memory is one"),
        tile_bytes=Sourced(24e9, "Nvidia: 24 GB GDDR6X"),
        clock_hz=Sourced(1.695e9, "Nvidia: boost clock"),
        fp16_flops=Sourced(71e12, "Nvidia, GA102: tensor cores, FP16 added up in FP32, dense"),
        fp32_flops=Sourced(35.6e12, "Nvidia: FP32"),
        memory_bandwidth=Sourced(936e9, "Nvidia: GDDR6X"),
        link_bandwidth=Sourced(31.5e9, "PCIe Gen4 x16"),
        host_bandwidth=Sourced(31.5e9, "PCIe Gen4 x16"),
        streaming_bandwidth=Sourced(31.5e9, "PCIe Gen4 x16; not used"),
    ),
}


class PublishedRun(NamedTuple):
    """Somebody's measured training of ViT-B/16 at 224 pixels.

    `settings` are overrides of a configuration, `image_bytes` what an image took on its way in;
    `is_fitted` tells the runs that the time of a pipeline cycle is fitted to.
    """

    what: str
    hardware: str
    settings: Tuple[str, ...]
    image_bytes: int
    samples_per_s: float
    source: str
    is_fitted: bool
    note: str = ""


_FP16_RGB = 3 * 224 * 224 * 2
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

#: Graphcore's tutorial, from the settings that its log prints.
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
    image_bytes=_FP16_RGB,
    samples_per_s=307.745,
    source="the tutorial's printed log; it does not name the machine, a Mk2 is assumed",
    is_fitted=False,
    note="bound by its host, most likely: eight workers decoded full-size PNGs, and its evaluation,"
    " forward passes only, ran no faster (262 to 276 samples/s); it also kept the moments off the"
    " chip",
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
        image_bytes=_FP16_RGB,
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
        image_bytes=_FP16_RGB,
        samples_per_s=7615,
        source="graphcore.cn/performance-results, SDK 3.0 (batch 65,536); the recipe:"
        " graphcore/examples, vision/vit/pytorch/configs.yml, b16_in1k_pretrain_lamb",
        is_fitted=True,
    ),
    TUTORIAL,
    PublishedRun(
        what="one RTX 3090, AMP, 192 a batch",
        hardware="gpu",
        settings=(
            *("model.name=vit-base", "model.patch_size=16", "data.image_size=224"),
            *("pipeline.layers_per_stage=[12]", "batch.micro_batch_size=192"),
            *("engine.name=torch", "engine.precision=fp16", "optim.name=sgd"),
        ),
        image_bytes=_FP16_RGB,
        samples_per_s=390.9,
        source="timm, results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv",
        is_fitted=True,
    ),
)

#: Vertex code and state, exchange and control code of a training stage.
CODE_BYTES = Sourced(
    70e6,
    "peers: 50 to 90 MB, read off popliner's tests (BERT, 50 to 55 MB in inference); a layer"
    " that repeats is outlined, so the code hardly grows with their number",
)
#: What the fullest tile holds, over the mean of what is counted.
IMBALANCE = Sourced(
    1.33,
    "fitted: the largest published micro-batch of this model on four IPUs is 17"
    " (graphcore/examples, configs.yml, b16_imagenet1k); from 1.31 to 1.34 17 fits and 18 does not",
)
#: PopLibs' own memory proportion, where none is given.
DEFAULT_PROPORTION = Sourced(0.6, "graphcore/examples, vision/unet_medical/tensorflow2/README.md")
#: Part of the predicted total, either way.
MEMORY_UNCERTAINTY = 0.10
#: How far the published speeds may be off from one another: they are of other recipes.
SPEED_UNCERTAINTY = 0.05

#: Images that a core decodes and resizes, and that a loader process serves from the cache, a second.
DECODED_PER_S = Sourced(142, "benchmarks.data_loading, README: data.cache=off, a core (AMD EPYC)")
CACHED_PER_S = Sourced(
    25_000, "benchmarks.data_loading, README: the cache, one loader process, 224 pixels"
)
