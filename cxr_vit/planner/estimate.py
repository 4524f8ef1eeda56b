"""A configuration's plan: memory of each device, time of an update, speed. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.ipu_rules import reserved_ipus
from cxr_vit.config.schema import DataSection
from cxr_vit.data.list_files import find_lists, read_list
from cxr_vit.errors import DataError
from cxr_vit.planner.costs import ModelShape, StageCost
from cxr_vit.planner.hardware import HARDWARE, IPUS_A_MACHINE, Hardware, Sourced
from cxr_vit.planner.memory import Formats, StageMemory, stage_memory
from cxr_vit.planner.speed import (
    SpeedModel,
    Workload,
    published_corners,
    published_model,
    workload,
)
from cxr_vit.planner.timeline import StageTime, Timeline, in_flight, simulate

__all__ = ["Plan", "StagePrediction", "choose_hardware", "make_plan", "processes_needed"]

#: NIH's official training list, of which the validation films are drawn; all films.
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
    films, films_source
        Training films an epoch, and where their number is from.
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
    films: int
    films_source: str
    devices: int
    formats: Formats

    @property
    def place(self) -> str:
        """What a stage runs on."""
        return "IPU" if self.hardware.is_ipu else "GPU"

    @property
    def samples_per_s(self) -> float:
        """Films trained on a second."""
        return self.work.samples / self.seconds

    @property
    def speed_range(self) -> Tuple[float, float]:
        """The lowest and the highest speed that the constants allow."""
        return self.work.samples / self.highest_s, self.work.samples / self.lowest_s

    @property
    def epoch_minutes(self) -> float:
        """Minutes of an epoch, without validation and compilation."""
        return self.films / self.samples_per_s / 60

    @property
    def host_bytes_per_s(self) -> float:
        """Bytes that cross from the host a second: films and labels."""
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
    films: Optional[int] = None,
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
    films
        Training films an epoch; None to count those of the lists, else to take NIH's.
    image_bytes
        What a film takes as it crosses to the device; None for one gray byte a pixel.

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
    count, source = (films, "--films") if films else _training_films(config.data)
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
        films=count,
        films_source=source,
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


def _training_films(data: DataSection) -> Tuple[int, str]:
    """Count the training films as far as the lists tell; else assume NIH's."""
    kept = 1 - data.val_fraction
    if data.sample_images and not Path(data.root).exists():
        from cxr_vit.data.sample import TEST_SHARE

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
    """Return how many processes deliver so many films a second, if one delivers `each`."""
    return math.ceil(samples_per_s / each.value)
