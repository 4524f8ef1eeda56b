"""The rules that cross sections, as one list; every broken one is reported. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Callable, List, Optional, Tuple

from cxr_vit.config.architectures import SIZES, known_depth
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import LARGEST_IMAGE, SMALLEST_IMAGE, Config
from cxr_vit.errors import ConfigError, did_you_mean

__all__ = ["check", "check_processes", "depth_problem", "describe_processes", "schedule_problem"]


def depth_problem(layers_per_stage: List[int], depth: int) -> Optional[str]:
    """Say that the stages do not hold the model's layers, or return None."""
    placed = sum(layers_per_stage)
    if placed == depth:
        return None
    return (
        f"pipeline.layers_per_stage={layers_per_stage} places {placed} layers;"
        f" the model has {depth}. Make the list add up to {depth}."
    )


def _layers_are_placed(config: Config) -> Optional[str]:
    depth = known_depth(config.model.name)
    return None if depth is None else depth_problem(config.pipeline.layers_per_stage, depth)


def _eval_layers_are_placed(config: Config) -> Optional[str]:
    training = config.pipeline.layers_per_stage
    evaluation = config.pipeline.eval_layers_per_stage
    if evaluation is None or sum(evaluation) == sum(training):
        return None
    return (
        f"pipeline.eval_layers_per_stage={evaluation} places {sum(evaluation)} layers,"
        f" pipeline.layers_per_stage={training} {sum(training)}. Make them add up to the same."
    )


def _kept_layers_are_on_their_stage(config: Config) -> Optional[str]:
    recompute, layers = config.pipeline.recompute, config.pipeline.layers_per_stage
    if isinstance(recompute, str):
        return None
    if len(recompute) != len(layers):
        return (
            f"pipeline.recompute={recompute} has {len(recompute)} items; there are {len(layers)}"
            " stages. Give one a stage, or a single word for all."
        )
    for stage, choice in enumerate(recompute):
        first = sum(layers[:stage])
        there = range(first, first + layers[stage])
        if not isinstance(choice, str) and not set(choice) <= set(there):
            return (
                f"pipeline.recompute={recompute}: item {stage} names layers {choice}, but stage"
                f" {stage} has the layers {list(there)}."
            )
    return None


def _optimizer_is_the_engines(config: Config) -> Optional[str]:
    if config.optim.name != "lamb" or config.engine.name not in ("torch", "pipeline"):
        return None
    return (
        f"optim.name=lamb is PopTorch's own; engine.name={config.engine.name} has adamw and sgd."
        " Set optim.name, or engine.name=poptorch."
    )


def _no_process_is_empty(config: Config) -> Optional[str]:
    layers = config.pipeline.layers_per_stage
    if config.engine.name != "pipeline" or 0 not in layers[1:-1]:
        return None
    return (
        f"pipeline.layers_per_stage={layers} leaves stage {layers.index(0, 1)} without work. Only"
        " the first stage (embedding) and the last (head) may have 0 layers."
    )


def _nearest_multiples(value: int, unit: int, *, lowest: int = 1, highest: float = math.inf) -> str:
    """Write the multiples of `unit` on either side of `value` that the range allows."""
    below = value // unit * unit
    legal = [str(number) for number in (below, below + unit) if lowest <= number <= highest]
    return " or ".join(legal) if legal else f"none (the range is {lowest} to {highest})"


def _size_is_known(config: Config) -> Optional[str]:
    name = config.model.name
    if name in SIZES or "/" in name or Path(name).is_dir():
        return None
    near = did_you_mean(name, SIZES)
    hint = f" Did you mean {near!r}?" if near else ""
    return (
        f"model.name={name!r} is no size known here, no local folder and no hub name"
        f" (owner/model).{hint} Sizes: {', '.join(SIZES)}."
    )


def _patches_fill_the_image(config: Config) -> Optional[str]:
    size, patch = config.data.image_size, config.model.patch_size
    if config.model.name not in SIZES or size % patch == 0:
        return None
    legal = _nearest_multiples(size, patch, lowest=SMALLEST_IMAGE, highest=LARGEST_IMAGE)
    return (
        f"data.image_size={size} is not a multiple of model.patch_size={patch}."
        f" Nearest legal image sizes: {legal}."
    )


def _micro_batches_fill_the_batch(config: Config) -> Optional[str]:
    batch = config.batch
    unit = batch.micro_batch_size * batch.replicas
    if batch.global_batch_size is None or batch.global_batch_size % unit == 0:
        return None
    return (
        f"batch.global_batch_size={batch.global_batch_size} is not a multiple of"
        f" {unit} = {batch.micro_batch_size} micro-batch x {batch.replicas} replicas."
        f" Nearest legal values: {_nearest_multiples(batch.global_batch_size, unit)}."
    )


def _fractions_leave_training(config: Config) -> Optional[str]:
    data = config.data
    if data.split in ("auto", "official") or data.val_fraction + data.test_fraction < 1:
        return None
    return (
        f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave"
        " nothing to train on. Their sum must be below 1."
    )


def _steps_fill_host_calls(config: Config) -> Optional[str]:
    steps, iterations = config.train.steps, config.batch.device_iterations
    if steps is None or steps % iterations == 0:
        return None
    legal = _nearest_multiples(steps, iterations)
    return (
        f"train.steps={steps} is not a multiple of batch.device_iterations={iterations}: a host"
        f" call makes {iterations} weight updates. Nearest legal values: {legal}."
    )


RULES: Tuple[Callable[[Config], Optional[str]], ...] = (
    _size_is_known,
    _layers_are_placed,
    _eval_layers_are_placed,
    _kept_layers_are_on_their_stage,
    _optimizer_is_the_engines,
    _no_process_is_empty,
    _patches_fill_the_image,
    _micro_batches_fill_the_batch,
    _fractions_leave_training,
    _steps_fill_host_calls,
)


def check(config: Config) -> Config:
    """Return the config if no rule is broken.

    Raises
    ------
    ConfigError
        Listing every broken rule, each with what was given and the nearest legal values.
    """
    problems = [problem for problem in (rule(config) for rule in RULES) if problem]
    if config.engine.name == "poptorch" and not problems:  # its rules count on the others
        # How many replicas a process has only its start tells: poprun may share them out.
        problems = ipu_problems(config, replicas=1)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def check_processes(config: Config, engine: str, world_size: int) -> None:
    """Raise unless a number of processes can share a configuration's work out.

    Parameters
    ----------
    config
        The configuration.
    engine
        ``"pipeline"`` or ``"torch"``.
    world_size
        How many processes there are.

    Raises
    ------
    ConfigError
        If they are too many, too few, or the schedule has too few micro-batches for them.
    """
    if engine == "pipeline":
        problem = _world_problem(config, world_size) or schedule_problem(
            config, world_size // config.batch.replicas
        )
    else:
        problem = _replicas_problem(config, world_size)
    if problem:
        raise ConfigError(problem)


def describe_processes(config: Config) -> str:
    """Say in a line how the pipeline engine is started with a configuration, or why it cannot."""
    stages, replicas = len(config.pipeline.layers_per_stage), config.batch.replicas
    if stages * replicas == 1:
        return "on processes one stage and one replica: nothing to share out"
    problem = schedule_problem(config, stages)
    if problem:
        return f"on processes engine.name=pipeline is refused: {problem}"
    return (
        f"on processes torchrun --nproc-per-node {stages * replicas} train.py ..."
        f" engine.name=pipeline ({stages} stages x {replicas} replicas,"
        f" {config.pipeline.schedule})"
    )


def _replicas_problem(config: Config, world_size: int) -> Optional[str]:
    replicas = config.batch.replicas
    if replicas % world_size == 0:
        return None
    return (
        f"batch.replicas={replicas}, but torchrun started {world_size} processes, which the torch"
        f" engine gives a replica each, or several. Set batch.replicas={world_size} (and divide"
        " batch.gradient_accumulation to keep the global batch), start as many processes as there"
        f" are replicas (torchrun --nproc-per-node {replicas}), or cut the model into stages:"
        " engine.name=pipeline."
    )


def _world_problem(config: Config, world_size: int) -> Optional[str]:
    stages, replicas = len(config.pipeline.layers_per_stage), config.batch.replicas
    legal = [stages * replicas]
    if config.pipeline.schedule == "interleaved_1f1b":
        legal += [stages // n * replicas for n in range(2, stages) if stages % n == 0]
    if legal[0] == 1:
        return (
            "engine.name=pipeline with one stage and one replica is one process: that is"
            " engine.name=torch."
        )
    if world_size in legal:
        return None
    if world_size == 1:
        instead = "compute in one process: engine.name=torch"
    else:
        instead = "change pipeline.layers_per_stage or batch.replicas"
    also = f" (or {', '.join(map(str, legal[1:]))}, several stages each)" if legal[1:] else ""
    return (
        f"engine.name=pipeline needs {legal[0]} processes = {stages} stages x {replicas}"
        f" replicas{also}, and there {'is' if world_size == 1 else 'are'} {world_size}. Start it"
        f" with torchrun --nproc-per-node {legal[0]}, or {instead}."
    )


def schedule_problem(config: Config, processes: int) -> Optional[str]:
    """Say why torch's schedule cannot run on so many processes a replica, or return None."""
    schedule, stages = config.pipeline.schedule, len(config.pipeline.layers_per_stage)
    count = BatchPlan.from_section(config.batch).gradient_accumulation
    given = f"batch.gradient_accumulation={count}"
    if config.batch.global_batch_size is not None:
        given = f"batch.global_batch_size={config.batch.global_batch_size}, an accumulation of"
        given += f" {count},"
    if schedule == "1f1b" and count < stages:
        return (
            f"{given} is less than the {stages} stages, and pipeline.schedule=1f1b must fill them."
            f" Smallest legal value: {stages}. (Or pipeline.schedule=gpipe.)"
        )
    if schedule == "interleaved_1f1b" and not _goes_round(count, processes):
        return (
            f"{given} does not go round {processes} processes: pipeline.schedule=interleaved_1f1b"
            f" divides the micro-batches evenly into {max(1, count // processes)}"
            f" rounds. Nearest legal values: {_nearest(count, processes)}."
        )
    return None


def _goes_round(count: int, processes: int) -> bool:
    """Whether ScheduleInterleaved1F1B takes so many micro-batches."""
    return count % max(1, count // processes) == 0


def _nearest(count: int, processes: int) -> str:
    below: List[int] = [n for n in range(count, 0, -1) if _goes_round(n, processes)][:1]
    above = next(n for n in range(count, count + processes + 1) if _goes_round(n, processes))
    return " or ".join(str(n) for n in [*below, above])
