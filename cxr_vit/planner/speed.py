"""How long a stage takes, by two constants, and what they are fitted to.

A micro-batch on a stage takes a start (messages, programs, waiting) and the time of its matrix
products at a part of the device's peak. Imports no torch.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import List, NamedTuple, Optional, Sequence, Tuple

from cxr_vit.config import BatchPlan, Config, load_config
from cxr_vit.config.plans import StagePlan
from cxr_vit.errors import ConfigError
from cxr_vit.planner.costs import Formats, ModelShape, StageCost, stage_cost
from cxr_vit.planner.hardware import (
    HARDWARE,
    PUBLISHED,
    SPEED_UNCERTAINTY,
    Hardware,
    PublishedRun,
)
from cxr_vit.planner.timeline import StageTime, num_cycles, simulate

__all__ = [
    "Measured",
    "SpeedModel",
    "Workload",
    "fit",
    "published_corners",
    "published_model",
    "published_workload",
    "update_seconds",
    "workload",
]

#: Micro-batches after which a pipeline of processes is as steady as it will be.
_STEADY = 512


class SpeedModel(NamedTuple):
    """The two constants, without a unit of one device; `basis` says what they are fitted to.

    Attributes
    ----------
    start_cycles
        Clock cycles that a micro-batch takes on a stage besides its products.
    efficiency
        The part of the peak that the products reach.
    """

    start_cycles: float
    efficiency: float
    basis: str

    def start_s(self, hardware: Hardware) -> float:
        """Return the start on a device, seconds."""
        return self.start_cycles / hardware.clock_hz.value

    def flops_per_s(self, hardware: Hardware, precision: str) -> float:
        """Return what the products reach on a device, operations a second."""
        return self.efficiency * hardware.peak_flops(precision)


class Workload(NamedTuple):
    """What one replica has to do in one weight update, on which device, in which order."""

    hardware: Hardware
    schedule: str
    precision: str
    micro_batch_size: int
    micro_batches: int
    replicas: int
    costs: Tuple[StageCost, ...]
    update_s: Tuple[float, ...]

    @property
    def samples(self) -> int:
        """Images of a weight update of all replicas."""
        return self.micro_batch_size * self.micro_batches * self.replicas

    @property
    def recomputes(self) -> bool:
        """Whether the stages compute again what they do not keep."""
        return _recomputes(self.hardware, self.schedule, len(self.costs))

    def stage_times(self, model: SpeedModel) -> List[StageTime]:
        """Return the time of a micro-batch on each stage."""
        start_s = model.start_s(self.hardware)
        rate = model.flops_per_s(self.hardware, self.precision)
        times = []
        for cost, update_s in zip(self.costs, self.update_s):
            whole_s = start_s + self.micro_batch_size * cost.flops / rate
            forward, again = cost.forward_flops / cost.flops, cost.recompute_flops / cost.flops
            backward = 1 - forward - again
            times.append(
                StageTime(whole_s * forward, whole_s * again, whole_s * backward, update_s)
            )
        return times

    def seconds(self, model: SpeedModel) -> float:
        """Return the time of a weight update."""
        return self._work_s(model, self.micro_batches) + max(self.update_s)

    def _work_s(self, model: SpeedModel, micro_batches: int) -> float:
        """Return the time of an update's micro-batches."""
        times = self.stage_times(model)
        if self.schedule == "lockstep":
            cycles = num_cycles(len(times), micro_batches)
            return cycles * max(time.micro_batch_s for time in times)
        if self.schedule == "in_order":
            return micro_batches * sum(time.micro_batch_s for time in times)
        if micro_batches > _STEADY:  # from here on each takes as long as the one before
            half, whole = (self._work_s(model, count) for count in (_STEADY // 2, _STEADY))
            return whole + (micro_batches - _STEADY) * (whole - half) / (_STEADY - _STEADY // 2)
        return simulate(self.schedule, times, micro_batches).work_s

    def bubble(self, model: SpeedModel) -> float:
        """Return the part of an update's work that is more than the slowest stage's own.

        Of stages in order none is the slowest: another always works.
        """
        times = [time.micro_batch_s for time in self.stage_times(model)]
        own = sum(times) if self.schedule == "in_order" else max(times)
        return 1 - self.micro_batches * own / self._work_s(model, self.micro_batches)

    def coefficients(self) -> Tuple[float, float]:
        """Return what an update's work takes for one cycle of a start, and at the whole peak."""
        starts = self._work_s(SpeedModel(1.0, math.inf, ""), self.micro_batches)
        return starts, self._work_s(SpeedModel(0.0, 1.0, ""), self.micro_batches)


def workload(
    config: Config,
    hardware: Hardware,
    engine: Optional[str] = None,
    local_replicas: Optional[int] = None,
) -> Workload:
    """Work out what a configuration has a device do.

    Parameters
    ----------
    config
        The configuration.
    hardware
        The device.
    engine
        The engine that was chosen; None for `engine.name`.
    local_replicas
        Of one process; None for all.

    Raises
    ------
    ConfigError
        If the model's shape is not known without loading it, or a stage has nothing to do.
    """
    shape, batch = ModelShape.from_config(config), BatchPlan.from_section(config.batch)
    layers, schedule = _stages(config, hardware, engine or config.engine.name)
    if 0 in layers[1:-1]:
        raise ConfigError(
            f"pipeline.layers_per_stage={layers} leaves stage {layers.index(0, 1)} without work."
            " Only the first stage (embedding) and the last (head) may have 0 layers."
        )
    recomputes = _recomputes(hardware, schedule, len(layers))
    plan = StagePlan.from_list(layers)
    kept = plan.kept_layers(config.pipeline.recompute) if recomputes else [[]] * len(layers)
    costs = tuple(
        stage_cost(
            shape,
            num_layers=count,
            is_first=stage == 0,
            is_last=stage == len(layers) - 1,
            kept=[layer - plan.layers(stage).start for layer in kept[stage]],
            recomputes=recomputes,
        )
        for stage, count in enumerate(layers)
    )
    formats = Formats.from_config(config, hardware, local_replicas)
    return Workload(
        hardware=hardware,
        schedule=schedule,
        precision="fp32" if config.engine.precision == "fp32" else "fp16",
        micro_batch_size=batch.micro_batch_size,
        micro_batches=batch.gradient_accumulation,
        replicas=batch.replicas,
        costs=costs,
        update_s=tuple(update_seconds(cost, formats, hardware, batch.replicas) for cost in costs),
    )


def _recomputes(hardware: Hardware, schedule: str, stages: int) -> bool:
    """Whether PopTorch sets autoRecomputation (Compiler.cpp:571): for pipelines of several IPUs."""
    return hardware.is_ipu and schedule == "lockstep" and stages > 1


def _stages(config: Config, hardware: Hardware, engine: str) -> Tuple[List[int], str]:
    """Return the layers of each device's stage, and the schedule."""
    pipeline = config.pipeline
    if hardware.is_ipu:
        in_order = pipeline.execution == "sharded"
        return pipeline.layers_per_stage, "in_order" if in_order else "lockstep"
    if engine != "pipeline":  # the torch engine: the stages in turn on one device
        return [sum(pipeline.layers_per_stage)], "in_order"
    return pipeline.layers_per_stage, "gpipe" if pipeline.schedule == "gpipe" else "1f1b"


def update_seconds(cost: StageCost, formats: Formats, hardware: Hardware, replicas: int) -> float:
    """Return the time of a stage's weight update: memory traffic, all-reduce, streamed moments.

    The replicas' gradients go round a ring (2 (R - 1) / R of them over each link; Patarasuk and
    Yuan 2009).
    """
    touched = 2 * formats.weight + formats.accumulator + 2 * formats.moments * formats.on_chip
    update_s = touched * cost.parameters / hardware.memory_bandwidth.value
    exchanged = 2 * (replicas - 1) / replicas * formats.accumulator * cost.parameters
    update_s += exchanged / hardware.link_bandwidth.value
    if not formats.on_chip:
        streamed = 2 * formats.moments * cost.parameters / formats.shards
        update_s += streamed / hardware.streaming_bandwidth.value
    return update_s


class Measured(NamedTuple):
    """A workload and the seconds that its update was measured to take."""

    workload: Workload
    seconds: float


def fit(measured: Sequence[Measured], prior: SpeedModel, basis: str) -> SpeedModel:
    """Fit the constants to measurements, by least squares of the relative errors.

    Where all of them are of one mix of starts and products, the two cannot be told apart, and the
    prior's are scaled by one factor.
    """
    rows, scales = [], []
    for run in measured:
        starts, products = run.workload.coefficients()
        work_s = run.seconds - max(run.workload.update_s)
        rows.append((starts / work_s, products / work_s))
        scales.append((run.workload.seconds(prior) - max(run.workload.update_s)) / work_s)
    ss = sum(s * s for s, _ in rows)
    pp = sum(p * p for _, p in rows)
    sp = sum(s * p for s, p in rows)
    s1, p1 = sum(s for s, _ in rows), sum(p for _, p in rows)
    determinant = ss * pp - sp * sp
    if determinant > 1e-6 * ss * pp:
        start = (s1 * pp - p1 * sp) / determinant
        inverse = (ss * p1 - sp * s1) / determinant
        if start < 0:
            start, inverse = 0.0, p1 / pp
        if inverse > 0:
            return SpeedModel(start, 1 / inverse, basis)
    factor = sum(scales) / sum(scale * scale for scale in scales)
    return SpeedModel(prior.start_cycles * factor, prior.efficiency / factor, basis)


def published_workload(run: PublishedRun) -> Workload:
    """Return what a published run had its devices do."""
    return workload(load_config([], run.settings), HARDWARE[run.hardware])


def _published(hardware: Hardware) -> List[Measured]:
    """Return the published runs that a device's constants are fitted to."""
    found = []
    for run in PUBLISHED:
        if run.is_fitted and HARDWARE[run.hardware].is_ipu == hardware.is_ipu:
            work = published_workload(run)
            found.append(Measured(work, work.samples / run.samples_per_s))
    return found


@lru_cache(maxsize=None)
def published_model(hardware: Hardware) -> SpeedModel:
    """Return the constants fitted to what others published; IPUs differ in clock and peak alone."""
    runs = _published(hardware)
    points = "one published run" if len(runs) == 1 else f"{len(runs)} published runs"
    return fit(runs, SpeedModel(0.0, 1.0, ""), f"fitted to {points}")


@lru_cache(maxsize=None)
def published_corners(hardware: Hardware) -> Tuple[SpeedModel, ...]:
    """Return the constants as they would be, were the published runs as far off as they may be."""
    runs = _published(hardware)
    corners = []
    for signs in product((-1, 1), repeat=len(runs)):
        moved = [
            Measured(run.workload, run.seconds * (1 + sign * SPEED_UNCERTAINTY))
            for run, sign in zip(runs, signs)
        ]
        corners.append(fit(moved, SpeedModel(0.0, 1.0, ""), ""))
    return tuple(corners)
