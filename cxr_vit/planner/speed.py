"""Time of a weight update, from two constants of a device.

A micro-batch on a stage takes a fixed overhead (messages, programs, waiting) and the time of its
matrix products at a constant rate.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple, Optional, Sequence, Tuple

from cxr_vit.config import BatchPlan, Config, StagePlan, read_config
from cxr_vit.config.ipu_rules import eval_layers
from cxr_vit.config.plans import Kept, empty_stage_problem
from cxr_vit.console import count
from cxr_vit.errors import ConfigError
from cxr_vit.planner.costs import (
    Formats,
    ModelShape,
    StageCost,
    StageMemory,
    inference_cost,
    stage_cost,
    stage_memory,
)
from cxr_vit.planner.hardware import (
    IPUS,
    PUBLISHED,
    SPEED_UNCERTAINTY,
    Ipu,
    PublishedRun,
    Target,
    make_target,
)
from cxr_vit.planner.timeline import StageTime, in_flight, num_cycles, simulate

#: Micro-batches after which every further one of a process pipeline takes equally long.
_STEADY = 512
#: Part of the overhead of a training micro-batch that a forward pass is assumed to have: the
#: published runs have four passes (forward, recomputation, and backward for two).
FORWARD_PART = 0.25
#: The published runs are of this IPU.
_PUBLISHED_IPU = IPUS["bow"]


class Constants(NamedTuple):
    """Overhead of a micro-batch on a stage, and operations per second of the products."""

    overhead_s: float
    flops_per_s: float


class SpeedModel(NamedTuple):
    """The constants of a device, `others` that the measurements allow as well, and their basis.

    `error` is that of the predicted speed, as a share, either way.
    """

    constants: Constants
    others: Tuple[Constants, ...]
    error: float
    basis: str

    def range_s(self, work: Workload) -> Tuple[float, float]:
        """Return the shortest and the longest time of a weight update, seconds."""
        every = [work.seconds(constants) for constants in (self.constants, *self.others)]
        slowest_s = every[0] / (1 - self.error) if self.error < 1 else math.inf
        return min(*every, every[0] / (1 + self.error)), max(*every, slowest_s)

    def of_inference(self) -> SpeedModel:
        """Return the model of a forward pass.

        The overhead was measured in training only. A forward pass is assumed to have its part of
        it, and may have all.
        """
        every = (self.constants, *self.others)
        own, *others = (each._replace(overhead_s=each.overhead_s * FORWARD_PART) for each in every)
        return self._replace(constants=own, others=(*others, *every))


#: Constants for a device without measurements: its times are operations, and only their ratios mean
#: something. The overhead is unknown: it may be nothing or everything.
RELATIVE = SpeedModel(Constants(0.0, 1.0), (Constants(1.0, math.inf),), 0.0, "")


class Workload(NamedTuple):
    """Work of one replica in one weight update, or in one host call of evaluation.

    `schedule` is that of `timeline.simulate`. With `recomputes` the stages compute again what they
    do not keep. In evaluation the accumulation of `batch` is the number of device iterations.
    """

    target: Target
    shape: ModelShape
    batch: BatchPlan
    formats: Formats
    schedule: str
    recomputes: bool
    costs: Tuple[StageCost, ...]

    @property
    def is_training(self) -> bool:
        """Whether the stages are differentiated."""
        return self.formats.is_training

    @property
    def depths(self) -> Tuple[int, ...]:
        """Most micro-batches of which each stage keeps activations; none in evaluation.

        There every tensor is read in the pipeline stage that made it, and PopART stashes none
        (pipeline.cpp, getStashCandidateTensors).
        """
        stages, accumulation = len(self.costs), self.batch.gradient_accumulation
        if not self.is_training:
            return (0,) * stages
        return tuple(in_flight(self.schedule, i, stages, accumulation) for i in range(stages))

    @property
    def update_s(self) -> float:
        """Seconds of the weight update itself, on the stage where it takes longest."""
        return max(self._update_s(cost) for cost in self.costs)

    def _update_s(self, cost: StageCost) -> float:
        """Return the time of a stage's weight update: memory, all-reduce, streamed moments.

        The gradients go round a ring of the replicas: 2 (R - 1) / R of them over each link
        (Patarasuk and Yuan 2009). For devices other than IPUs it is 0: a calibrated rate includes
        the update.
        """
        ipu, formats, replicas = self.target.ipu, self.formats, self.batch.replicas
        if ipu is None or not self.is_training:
            return 0.0
        touched = 2 * formats.weight + formats.accumulator
        if formats.on_chip:
            touched += 2 * formats.moments
        update_s = touched * cost.parameters / ipu.memory_bandwidth.value
        exchanged = 2 * (replicas - 1) / replicas * formats.accumulator * cost.parameters
        update_s += exchanged / ipu.link_bandwidth.value
        if not formats.on_chip:
            streamed = 2 * formats.moments * cost.parameters / formats.shards
            update_s += streamed / ipu.streaming_bandwidth.value
        return update_s

    def casts_s(self, cost: StageCost) -> float:
        """Return the least time in which a stage casts fp32 weights to fp16 for a micro-batch.

        PopART's Cast takes over the layout of its input and passes none on (castx.cpp; opx.cpp,
        canUnwind), so that the exchange brings the weights to the tiles of each product, and their
        gradients, cast to fp32, back. It is not part of the other times.
        """
        ipu, formats = self.target.ipu, self.formats
        if ipu is None or formats.weight <= formats.activation:
            return 0.0
        cast = formats.weight + formats.activation  # bytes read and written
        times = 1 + bool(cost.recompute_flops) + (formats.is_training)
        in_products = cost.num_layers * self.shape.product_weights()
        laid_out = (times * formats.activation) + formats.is_training * formats.weight
        seconds = times * cast / ipu.memory_bandwidth.value
        return in_products * (seconds + laid_out / ipu.exchange_bandwidth.value)

    def memory(self, stage: int, cost: StageCost, depth: int) -> StageMemory:
        """Predict the memory of a stage with these costs."""
        images = self.batch.micro_batch_size
        return stage_memory(cost, self.shape, self.formats, self.target, stage, depth, images)

    def stage_time(self, cost: StageCost, constants: Constants) -> StageTime:
        """Return the times of a stage with these costs."""
        images = self.batch.micro_batch_size
        whole_s = constants.overhead_s + images * cost.flops / constants.flops_per_s
        forward, again = cost.forward_flops / cost.flops, cost.recompute_flops / cost.flops
        backward, update_s = cost.backward_flops / cost.flops, self._update_s(cost)
        return StageTime(whole_s * forward, whole_s * again, whole_s * backward, update_s)

    def seconds(self, constants: Constants) -> float:
        """Return the time of a weight update."""
        return self.micro_batches_s(constants, self.batch.gradient_accumulation) + self.update_s

    def micro_batches_s(self, constants: Constants, micro_batches: int) -> float:
        """Return the time of an update's micro-batches."""
        times = [self.stage_time(cost, constants) for cost in self.costs]
        if self.schedule == "lockstep":
            cycles = num_cycles(len(times), micro_batches, self.is_training)
            return cycles * max(time.micro_batch_s for time in times)
        if self.schedule == "in_order":
            return micro_batches * sum(time.micro_batch_s for time in times)
        if micro_batches > _STEADY:
            half, whole = (self.micro_batches_s(constants, n) for n in (_STEADY // 2, _STEADY))
            return whole + (micro_batches - _STEADY) * (whole - half) / (_STEADY - _STEADY // 2)
        return simulate(self.schedule, times, micro_batches).work_s

    def bubble(self, constants: Constants) -> float:
        """Return the share of an update's work in which the slowest stage waits.

        Stages in order have no slowest one: another always works.
        """
        accumulation = self.batch.gradient_accumulation
        times = [self.stage_time(cost, constants).micro_batch_s for cost in self.costs]
        own = sum(times) if self.schedule == "in_order" else max(times)
        return 1 - accumulation * own / self.micro_batches_s(constants, accumulation)


def workload(config: Config, target: Target, local_replicas: Optional[int] = None) -> Workload:
    """Return the work that a configuration gives a device; one process has `local_replicas`.

    Raises ConfigError if the shape is unknown without loading the model, or a stage has no work.
    """
    shape, batch = ModelShape.from_config(config), BatchPlan.from_section(config.batch)
    formats = Formats.from_config(config, target, batch, local_replicas)
    layers, in_order = config.pipeline.layers_per_stage, config.pipeline.execution == "sharded"
    if target.engine == "poptorch":
        schedule = "in_order" if in_order else "lockstep"
    elif target.engine == "torch":  # all stages on one device
        layers, schedule = [sum(layers)], "in_order"
    else:
        schedule = "gpipe" if config.pipeline.schedule == "gpipe" else "1f1b"
    problem = empty_stage_problem(layers)
    if problem:
        raise ConfigError(str(problem))
    on_ipus = target.engine == "poptorch"
    # PopTorch sets autoRecomputation for pipelines of several IPUs (Compiler.cpp:571).
    stashes = schedule == "lockstep" and len(layers) > 1
    cut = StagePlan.from_list(config.pipeline.layers_per_stage)
    found = cut.kept_outputs(config.pipeline.recompute, on_ipus=on_ipus)
    recomputes = found is not None and (stashes or not on_ipus)
    kept = found if found is not None and recomputes else [Kept([], [])] * cut.num_stages
    plan = StagePlan.from_list(layers)
    if target.engine == "torch":
        kept = [_joined(cut, kept)]
    costs = tuple(
        stage_cost(
            shape,
            num_layers=number,
            is_first=plan.has_embedding(stage),
            is_last=plan.has_head(stage),
            kept=[layer - plan.layers(stage).start for layer in kept[stage].layers],
            attentions=[layer - plan.layers(stage).start for layer in kept[stage].attentions],
            recomputes=recomputes,
            stashes=stashes,
            on_ipu=on_ipus,
        )
        for stage, number in enumerate(layers)
    )
    return Workload(target, shape, batch, formats, schedule, recomputes, costs)


def _joined(cut: StagePlan, kept: Sequence[Kept]) -> Kept:
    """Return what stages on one device keep; the input of a stage is the output of a layer."""
    inputs = {cut.layers(stage).start - 1 for stage in range(1, cut.num_stages)} - {-1}
    layers = inputs.union(*(own.layers for own in kept))
    return Kept(sorted(layers), [layer for own in kept for layer in own.attentions])


def inference_workload(config: Config, target: Target) -> Workload:
    """Return the work of a host call of evaluation on IPUs; ConfigError as in `workload`."""
    shape, batch = ModelShape.from_config(config), BatchPlan.from_section(config.batch)
    formats = Formats.from_config(config, target, batch).in_evaluation(config)
    call = replace(
        batch,
        micro_batch_size=batch.eval_micro_batch_size,
        gradient_accumulation=batch.eval_device_iterations,
        replicas=batch.eval_replicas,
        device_iterations=1,
    )
    plan = StagePlan.from_list(eval_layers(config))
    problem = empty_stage_problem(plan.layers_per_stage, key="eval_layers_per_stage")
    if problem:
        raise ConfigError(str(problem))
    costs = tuple(
        inference_cost(
            shape,
            num_layers=number,
            is_first=plan.has_embedding(stage),
            is_last=plan.has_head(stage),
        )
        for stage, number in enumerate(plan.layers_per_stage)
    )
    schedule = "in_order" if config.pipeline.eval_execution == "sharded" else "lockstep"
    return Workload(target, shape, call, formats, schedule, False, costs)


class Measured(NamedTuple):
    """A run's workload, the measured seconds of its update, and their scatter, as a share."""

    name: str
    work: Workload
    seconds: float
    scatter: float = 0.0

    @property
    def work_s(self) -> float:
        """Seconds without the weight update itself."""
        return self.seconds - self.work.update_s

    def predicted_s(self, constants: Constants) -> float:
        """Return the predicted value of `work_s`."""
        return self.work.seconds(constants) - self.work.update_s


def fit(measured: Sequence[Measured], prior: SpeedModel) -> SpeedModel:
    """Fit constants to measurements, by least squares of the relative errors.

    Runs of three or more micro-batch sizes determine both constants; the others that they allow are
    the fits without one of the runs. Fewer determine one factor on the prior's constants. The error
    is the largest residual or scatter of a run, and at least `SPEED_UNCERTAINTY`.
    """
    sizes = {run.work.batch.micro_batch_size for run in measured}
    both = _fit_both(measured) if len(sizes) >= 3 else None
    if both:
        constants, what = both, "2 constants"
        without = [_fit_both([*measured[:i], *measured[i + 1 :]]) for i in range(len(measured))]
        others = tuple(filter(None, without))
    else:
        constants, what = _scaled(measured, prior.constants), "1 constant"
        others = tuple(_scaled(measured, other) for other in prior.others)
    residuals = [abs(run.work.seconds(constants) / run.seconds - 1) for run in measured]
    error = max(SPEED_UNCERTAINTY, *residuals, *(run.scatter for run in measured))
    names = ", ".join(run.name for run in measured)
    basis = f"{what} fitted to {count(len(measured), 'run')} ({names})"
    return SpeedModel(constants, others, error, basis)


def _fit_both(measured: Sequence[Measured]) -> Optional[Constants]:
    """Return both constants, or None if the measurements do not determine them."""
    starts = [run.predicted_s(Constants(1.0, math.inf)) / run.work_s for run in measured]
    products = [run.predicted_s(Constants(0.0, 1.0)) / run.work_s for run in measured]
    ss, pp = sum(s * s for s in starts), sum(p * p for p in products)
    sp = sum(s * p for s, p in zip(starts, products))
    s1, p1 = sum(starts), sum(products)
    determinant = ss * pp - sp * sp
    if determinant <= 1e-6 * ss * pp:
        return None
    overhead = (s1 * pp - p1 * sp) / determinant
    inverse = (ss * p1 - sp * s1) / determinant
    if overhead < 0:
        overhead, inverse = 0.0, p1 / pp
    return Constants(overhead, 1 / inverse) if inverse > 0 else None


def _scaled(measured: Sequence[Measured], prior: Constants) -> Constants:
    """Return the prior, slower or faster by the factor that fits best."""
    ratios = [run.predicted_s(prior) / run.work_s for run in measured]
    factor = sum(ratios) / sum(ratio * ratio for ratio in ratios)
    return Constants(prior.overhead_s * factor, prior.flops_per_s / factor)


def published_workload(run: PublishedRun) -> Workload:
    """Return the workload of a published run."""
    config = read_config([], run.settings)
    return workload(config, make_target("poptorch", "IPU", config.engine.precision, run.hardware))


@lru_cache(maxsize=None)
def _published_fits() -> Tuple[Constants, ...]:
    """Fit the published runs as they are, then with each `SPEED_UNCERTAINTY` off either way."""
    runs = []
    for published in PUBLISHED:
        if published.is_fitted:
            work = published_workload(published)
            seconds = work.batch.global_batch_size / published.samples_per_s
            runs.append(Measured(published.what, work, seconds))
    fits = []
    for signs in [(0,) * len(runs), *product((-1, 1), repeat=len(runs))]:
        factors = [1 + sign * SPEED_UNCERTAINTY for sign in signs]
        moved = [run._replace(seconds=run.seconds * f) for run, f in zip(runs, factors)]
        fits.append(_fit_both(moved))
    return tuple(filter(None, fits))


@lru_cache(maxsize=None)
def published_model(ipu: Ipu, precision: str) -> SpeedModel:
    """Return the constants fitted to published runs; IPUs differ in clock and peak only."""
    slower = _PUBLISHED_IPU.clock_hz.value / ipu.clock_hz.value
    faster = ipu.peak_flops(precision) / _PUBLISHED_IPU.peak_flops("fp16")
    fits = _published_fits()
    constants, *others = (Constants(own[0] * slower, own[1] * faster) for own in fits)
    basis = (
        "2 constants fitted to 2 published runs, so no third run checks them; nothing here was"
        " measured on your machine"
    )
    return SpeedModel(constants, tuple(others), SPEED_UNCERTAINTY, basis)
