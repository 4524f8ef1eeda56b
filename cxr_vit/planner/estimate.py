"""A configuration's plan: memory of each device, time of an update, speed. Imports no torch."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.ipu_rules import ipu_problems, reserved_ipus
from cxr_vit.config.schema import DataSection
from cxr_vit.data.text_files import find_lists, read_list
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.planner.costs import Formats, ModelShape, StageCost, StageMemory, stage_memory
from cxr_vit.planner.hardware import HARDWARE, IPUS_A_MACHINE, Hardware, Sourced
from cxr_vit.planner.speed import (
    SpeedModel,
    Workload,
    published_corners,
    published_model,
    workload,
)
from cxr_vit.planner.timeline import StageTime, Timeline, in_flight, simulate

__all__ = [
    "Plan",
    "StagePrediction",
    "choose_hardware",
    "describe_memory",
    "make_plan",
    "plan_of_run",
    "preflight",
    "processes_needed",
]


#: NIH's official training list, of which the validation images are drawn; all images.
_NIH_TRAINING, _NIH_ALL = 86_524, 112_120


class StagePrediction(NamedTuple):
    """What is predicted of one stage and its device."""

    stage: int
    cost: StageCost
    depth: int
    memory: StageMemory
    time: StageTime


class Plan(NamedTuple):
    """What is predicted of a configuration on a device.

    Attributes
    ----------
    hardware
        The device.
    shape
        The model's.
    work
        What a replica has to do.
    stages
        The predictions of the stages.
    model
        The constants that the times are made with.
    seconds
        Of a weight update.
    lowest_s, highest_s
        The range that the constants leave it in.
    images, images_source
        Training images an epoch, and where their number is from.
    devices
        How many are taken, replicas included; IPUs are reserved in powers of two.
    formats
        Bytes of elements, and where the optimizer's state lies.
    """

    hardware: Hardware
    shape: ModelShape
    work: Workload
    stages: Tuple[StagePrediction, ...]
    model: SpeedModel
    seconds: float
    lowest_s: float
    highest_s: float
    images: int
    images_source: str
    devices: int
    formats: Formats

    @property
    def place(self) -> str:
        """What a stage runs on."""
        return "IPU" if self.hardware.is_ipu else "GPU"

    @property
    def samples_per_s(self) -> float:
        """Images trained on a second."""
        return self.work.samples / self.seconds

    @property
    def speed_range(self) -> Tuple[float, float]:
        """The lowest and the highest speed that the constants allow."""
        return self.work.samples / self.highest_s, self.work.samples / self.lowest_s

    @property
    def epoch_minutes(self) -> float:
        """Minutes of an epoch, without validation and compilation."""
        return self.images / self.samples_per_s / 60

    @property
    def host_bytes_per_s(self) -> float:
        """Bytes that cross from the host a second: images and labels."""
        return self.samples_per_s * (self.shape.image_bytes + 4 * self.shape.num_labels)

    @property
    def bubble(self) -> float:
        """The part of an update in which the pipeline fills and drains."""
        return self.work.bubble(self.model)

    @property
    def host_bandwidth(self) -> float:
        """What the links of all machines carry, bytes a second."""
        machines = -(-self.devices // IPUS_A_MACHINE) if self.hardware.is_ipu else 1
        return machines * self.hardware.host_bandwidth.value

    @property
    def timeline(self) -> Timeline:
        """One weight update, laid out in time."""
        times = [stage.time for stage in self.stages]
        return simulate(self.work.schedule, times, self.work.micro_batches)

    @property
    def fullest(self) -> StagePrediction:
        """The stage whose device is the fullest."""
        return max(self.stages, key=lambda stage: stage.memory.share)

    @property
    def fits(self) -> bool:
        """Whether every device is predicted to hold its stage, however closely."""
        return self.fullest.memory.fits

    def by_speed(self) -> List[StagePrediction]:
        """Return the stages, the slowest first."""
        return sorted(self.stages, key=lambda stage: -stage.time.micro_batch_s)


def choose_hardware(config: Config, engine: Optional[str] = None) -> Hardware:
    """Return the device that `planner.hardware` means; `engine` as in `make_plan`."""
    name = config.planner.hardware
    if name == "auto":
        name = "gpu" if (engine or config.engine.name) in ("torch", "pipeline") else "mk2"
    return HARDWARE[name]


def make_plan(
    config: Config,
    *,
    engine: Optional[str] = None,
    local_replicas: Optional[int] = None,
    model: Optional[SpeedModel] = None,
    images: Optional[int] = None,
    image_bytes: Optional[int] = None,
) -> Plan:
    """Predict what a configuration takes.

    Parameters
    ----------
    config
        The configuration.
    engine
        The engine that was chosen; None for `engine.name`.
    local_replicas
        Of one process, which share the optimizer's state out; None for all.
    model
        Constants of the speed; None for those fitted to published runs.
    images
        Training images an epoch; None to count those of the lists, else to take NIH's.
    image_bytes
        What an image takes as it crosses to the device; None for one gray byte a pixel.

    Raises
    ------
    ConfigError
        If the model's shape is not known without loading it, or a stage has nothing to do.
    """
    hardware = choose_hardware(config, engine)
    work = workload(config, hardware, engine, local_replicas)
    formats = Formats.from_config(config, hardware, local_replicas)
    shape = ModelShape.from_config(config)
    if image_bytes is not None:
        shape = shape._replace(image_bytes=image_bytes)
    corners: Sequence[SpeedModel] = [model] if model else published_corners(hardware)
    model = model or published_model(hardware)
    seconds = work.seconds(model)
    every = [seconds, *(work.seconds(corner) for corner in corners)]
    count, source = (images, "--images") if images else _training_images(config.data)
    replicas, stages = BatchPlan.from_section(config.batch).replicas, len(work.costs)
    return Plan(
        hardware=hardware,
        shape=shape,
        work=work,
        stages=_predict_stages(formats, shape, work, model),
        model=model,
        seconds=seconds,
        lowest_s=min(every),
        highest_s=max(every),
        images=count,
        images_source=source,
        devices=reserved_ipus(stages, replicas) if hardware.is_ipu else stages * replicas,
        formats=formats,
    )


def _predict_stages(
    formats: Formats, shape: ModelShape, work: Workload, model: SpeedModel
) -> Tuple[StagePrediction, ...]:
    found = []
    for index, (cost, time) in enumerate(zip(work.costs, work.stage_times(model))):
        depth = in_flight(work.schedule, index, len(work.costs), work.micro_batches)
        memory = stage_memory(
            cost,
            shape,
            formats,
            work.hardware,
            stage=index,
            depth=depth,
            micro_batch_size=work.micro_batch_size,
        )
        found.append(StagePrediction(index, cost, depth, memory, time))
    return tuple(found)


def _training_images(data: DataSection) -> Tuple[int, str]:
    """Count the training images as far as the lists tell; else assume NIH's."""
    kept = 1 - data.val_fraction
    if data.sample_images and not Path(data.root).exists():
        from cxr_vit.synthetic.dataset import TEST_SHARE

        return math.floor(data.sample_images * (1 - TEST_SHARE) * kept), "of the synthetic sample"
    if data.split not in ("auto", "official"):
        return math.floor(_NIH_ALL * (kept - data.test_fraction)), "of NIH's"
    try:
        lists = find_lists(Path(data.root), data)
        if not {"train_list", "test_list"} <= set(lists):
            return math.floor(_NIH_TRAINING * kept), "NIH's official list"
        names = read_list(lists["train_list"])
        if "val_list" in lists:
            return len(names - read_list(lists["val_list"])), f"of {lists['train_list']}"
    except DataError:  # training says what is wrong with it
        return math.floor(_NIH_TRAINING * kept), "NIH's official list"
    return math.floor(len(names) * kept), f"of {lists['train_list']}"


def processes_needed(samples_per_s: float, each: Sourced) -> int:
    """Return how many processes deliver so many images a second, if one delivers `each`."""
    return math.ceil(samples_per_s / each.value)


logger = logging.getLogger(__name__)


def preflight(config: Config, engine: str, local_replicas: Optional[int] = None) -> None:
    """Plan a run on IPUs; where it is not predicted to fit, warn, or with `planner.strict` stop.

    Parameters
    ----------
    config
        The configuration.
    engine
        The engine that was chosen; nothing is done for another than ``"poptorch"``.
    local_replicas
        Those of this process, which share the optimizer's state out; None for all.

    Raises
    ------
    ConfigError
        If it is predicted not to fit, and `planner.strict` asks to stop.
    """
    if engine != "poptorch":
        return
    config = _on_ipus(config)
    try:
        plan = make_plan(config, engine=engine, local_replicas=local_replicas)
    except ConfigError as error:  # a model that must be loaded to know its shape
        if config.planner.strict:
            logger.warning("memory is not predicted: %s", error)
        return
    if plan.fits:
        return
    words = _describe(config, plan, local_replicas)
    if config.planner.strict:
        raise ConfigError(f"{words} (planner.strict=true stops here.)")
    logger.warning("%s", words)


def describe_memory(config: Config) -> str:
    """Say in a line how full the fullest IPU is predicted to be, and what would help."""
    config = _on_ipus(config)
    try:
        return _describe(config, make_plan(config, engine="poptorch"), None)
    except ConfigError as error:
        return f"memory is not predicted: {error}"


def plan_of_run(config: Config, engine: str) -> Optional[Tuple[Plan, str]]:
    """Plan a run for its pictures, and say what is to be said of them.

    Processes are planned as a stage a GPU; any other engine's stages as a pipeline of IPUs, which
    is what they are cut for, unless `planner.hardware` names another device.

    Parameters
    ----------
    config
        The configuration.
    engine
        The engine that was chosen.

    Returns
    -------
    tuple or None
        The plan and the note; None where the model must be loaded to know its shape.
    """
    hardware = config.planner.hardware
    if engine == "poptorch" or (engine == "torch" and hardware == "auto"):
        config = _on_ipus(config)
    try:
        plan = make_plan(config, engine=engine)
    except ConfigError as error:
        logger.info("no plan is drawn: %s", error)
        return None
    refused = plan.hardware.is_ipu and ipu_problems(config, replicas=1)
    return plan, "; PopTorch would refuse it" if refused else ""


def _on_ipus(config: Config) -> Config:
    """Return the configuration planned for IPUs, the Mk2 where it names none."""
    ipu = "bow" if config.planner.hardware == "bow" else "mk2"
    return config.changed(planner={"hardware": ipu})


def _describe(config: Config, plan: Plan, local_replicas: Optional[int]) -> str:
    fullest = plan.fullest
    memory, place = fullest.memory, f"{plan.place} {fullest.stage}"
    text = (
        f"predicted memory of {place}, the fullest: {memory.total / 1e6:,.0f} of"
        f" {memory.limit / 1e6:,.0f} MB, {100 * memory.share:.0f} %: {memory.verdict}."
    )
    if memory.fits:
        return text
    enough, less = _remedies(config, plan, local_replicas)
    if enough:
        return f"{text} Predicted to fit: {', or '.join(enough)}."
    helps = f" Each of these helps: {', '.join(less)}." if less else ""
    return f"{text}{helps} python -m cxr_vit plan --search tries other cuts."


def _remedies(
    config: Config, plan: Plan, local_replicas: Optional[int]
) -> Tuple[List[str], List[str]]:
    """Return single changes that make it fit, and those that only lower it."""
    changes: List[Tuple[str, Config]] = []
    smaller = _largest_that_fits(config, local_replicas)
    if smaller is not None:
        changes.append(smaller)
    changes += [
        (f"{section}.{key}={value}", config.changed(**{section: {key: value}}))
        for section, key, value in (
            ("pipeline", "recompute", "every_layer"),
            ("optim", "accumulator", "fp16"),
            ("engine", "weights", "fp16"),
        )
        if getattr(getattr(config, section), key) != value and config.engine.precision != "fp32"
    ]
    if config.engine.optimizer_state_on_chip:
        changed = config.changed(engine={"optimizer_state_on_chip": False})
        changes.append(("engine.optimizer_state_on_chip=false", changed))
    enough, less = [], []
    for text, changed in changes:
        other = make_plan(changed, engine="poptorch", local_replicas=local_replicas)
        if other.fits:
            enough.append(text)
        elif other.fullest.memory.share < plan.fullest.memory.share - 0.005:
            less.append(text)
    return enough, less


def _largest_that_fits(
    config: Config, local_replicas: Optional[int]
) -> Optional[Tuple[str, Config]]:
    """Return the next smaller micro-batch of the same global batch that fits, told and set."""
    batch = BatchPlan.from_section(config.batch)
    images = batch.micro_batch_size * batch.gradient_accumulation
    for size in range(batch.micro_batch_size - 1, 0, -1):
        if images % size:
            continue
        keys = {"micro_batch_size": size, "gradient_accumulation": images // size}
        changed = config.changed(batch={**keys, "global_batch_size": None})
        if make_plan(changed, engine="poptorch", local_replicas=local_replicas).fits:
            if config.batch.global_batch_size is not None:
                del keys["gradient_accumulation"]
            return " ".join(f"batch.{key}={value}" for key, value in keys.items()), changed
    return None
