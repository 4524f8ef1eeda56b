"""Rules that involve several sections, and rules for the number of processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Callable, Optional, Sequence, Tuple

from cxr_vit.config.architectures import SIZES, known_depth
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.plans import BatchPlan, StagePlan, empty_stage_problem, given_accumulation
from cxr_vit.config.schema import LARGEST_IMAGE, SMALLEST_IMAGE, Config
from cxr_vit.errors import ConfigError, Problem, did_you_mean

__all__ = ["check", "check_processes", "depth_problem", "describe_processes", "schedule_problem"]


def check(config: Config) -> Config:
    """Return the configuration unchanged if it breaks no rule.

    Raises
    ------
    ConfigError
        Listing every broken rule.
    """
    problems = [problem for problem in (rule(config) for rule in RULES) if problem]
    if config.engine.name == "poptorch" and not problems:  # its rules presuppose the others
        # poprun may divide the replicas among processes: how many each has is known at the start.
        problems = ipu_problems(config, replicas=1)
    if problems:
        raise ConfigError("\n".join(map(str, problems)))
    return config


def depth_problem(layers_per_stage: Sequence[int], depth: int) -> Optional[Problem]:
    """Return the problem of stages that do not add up to the model's layers, or None."""
    placed = sum(layers_per_stage)
    if placed == depth:
        return None
    return Problem(
        f"pipeline.layers_per_stage={list(layers_per_stage)}",
        f"places {placed} layers; the model has {depth}.",
        f"Make the list add up to {depth}.",
    )


def _size_is_known(config: Config) -> Optional[Problem]:
    name = config.model.name
    if name in SIZES or "/" in name or Path(name).is_dir():
        return None
    near = did_you_mean(name, SIZES)
    hint = f" Did you mean {near!r}?" if near else ""
    return Problem(
        f"model.name={name!r}",
        f"is no known size, no local folder and no hub name (owner/model).{hint}",
        f"Sizes: {', '.join(SIZES)}.",
    )


def _layers_are_placed(config: Config) -> Optional[Problem]:
    depth = known_depth(config.model.name)
    return None if depth is None else depth_problem(config.pipeline.layers_per_stage, depth)


def _eval_layers_are_placed(config: Config) -> Optional[Problem]:
    training = config.pipeline.layers_per_stage
    evaluation = config.pipeline.eval_layers_per_stage
    if evaluation is None or sum(evaluation) == sum(training):
        return None
    return Problem(
        f"pipeline.eval_layers_per_stage={evaluation}",
        f"places {sum(evaluation)} layers, pipeline.layers_per_stage={training} {sum(training)}.",
        "Make both add up to the same number.",
    )


def _kept_layers_are_on_their_stage(config: Config) -> Optional[Problem]:
    recompute, layers = config.pipeline.recompute, config.pipeline.layers_per_stage
    if isinstance(recompute, str):
        return None
    if len(recompute) != len(layers):
        return Problem(
            f"pipeline.recompute={recompute}",
            f"has {len(recompute)} items; there are {len(layers)} stages.",
            "Give one item per stage, or a single word for all.",
        )
    plan = StagePlan.from_list(layers)
    for stage, choice in enumerate(recompute):
        there = list(plan.layers(stage))
        if not isinstance(choice, str) and not set(choice) <= set(there):
            return Problem(
                f"pipeline.recompute={recompute}:",
                f"item {stage} names layers {choice}, but stage {stage} has the layers {there}.",
            )
    return None


def _optimizer_is_the_engines(config: Config) -> Optional[Problem]:
    if config.optim.name != "lamb" or config.engine.name not in ("torch", "pipeline"):
        return None
    return Problem(
        "optim.name=lamb",
        f"needs PopTorch; engine.name={config.engine.name} has adamw and sgd.",
        "Set optim.name, or engine.name=poptorch.",
    )


def _no_process_is_empty(config: Config) -> Optional[Problem]:
    if config.engine.name != "pipeline":
        return None
    return empty_stage_problem(config.pipeline.layers_per_stage)


def _patches_fill_the_image(config: Config) -> Optional[Problem]:
    size, patch = config.data.image_size, config.model.patch_size
    if config.model.name not in SIZES or size % patch == 0:
        return None
    legal = _nearest_multiples(size, patch, lowest=SMALLEST_IMAGE, highest=LARGEST_IMAGE)
    return Problem(
        f"data.image_size={size}",
        f"is not a multiple of model.patch_size={patch}.",
        f"Nearest legal image sizes: {legal}.",
    )


def _micro_batches_fill_the_batch(config: Config) -> Optional[Problem]:
    batch = config.batch
    unit = batch.micro_batch_size * batch.replicas
    if batch.global_batch_size is None or batch.global_batch_size % unit == 0:
        return None
    return Problem(
        f"batch.global_batch_size={batch.global_batch_size}",
        f"is not a multiple of {unit} = {batch.micro_batch_size} micro-batch x {batch.replicas}"
        " replicas.",
        f"Nearest legal values: {_nearest_multiples(batch.global_batch_size, unit)}.",
    )


def _fractions_leave_training(config: Config) -> Optional[Problem]:
    data = config.data
    if data.split in ("auto", "official") or data.val_fraction + data.test_fraction < 1:
        return None
    return Problem(
        f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction}",
        "leave nothing to train on.",
        "Their sum must be below 1.",
    )


def _steps_fill_host_calls(config: Config) -> Optional[Problem]:
    steps, iterations = config.train.steps, config.batch.device_iterations
    if steps is None or steps % iterations == 0:
        return None
    return Problem(
        f"train.steps={steps}",
        f"is not a multiple of batch.device_iterations={iterations}: a host call makes"
        f" {iterations} weight updates.",
        f"Nearest legal values: {_nearest_multiples(steps, iterations)}.",
    )


RULES: Tuple[Callable[[Config], Optional[Problem]], ...] = (
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


def _nearest_multiples(value: int, unit: int, *, lowest: int = 1, highest: float = math.inf) -> str:
    """Return the multiples of `unit` on either side of `value` that are in the range."""
    below = value // unit * unit
    legal = [str(number) for number in (below, below + unit) if lowest <= number <= highest]
    return " or ".join(legal) if legal else f"none (the range is {lowest} to {highest})"


def check_processes(config: Config, engine: str, world_size: int) -> None:
    """Check that a number of processes can run the configuration.

    Parameters
    ----------
    engine
        ``"pipeline"`` or ``"torch"``.
    world_size
        Number of processes.

    Raises
    ------
    ConfigError
        If there are too many or too few processes, or too few micro-batches for the schedule.
    """
    if engine == "pipeline":
        problem = _world_problem(config, world_size) or schedule_problem(
            config, world_size // config.batch.replicas
        )
    else:
        problem = _replicas_problem(config, world_size)
    if problem:
        raise ConfigError(str(problem))


def describe_processes(config: Config) -> str:
    """Return a line: how to start the pipeline engine, or why it refuses the configuration."""
    stages, replicas = len(config.pipeline.layers_per_stage), config.batch.replicas
    if stages * replicas == 1:
        return "on processes one stage and one replica: nothing to distribute"
    problem = schedule_problem(config, stages)
    if problem:
        return f"on processes engine.name=pipeline is refused: {problem}"
    return (
        f"on processes torchrun --nproc-per-node {stages * replicas} train.py ..."
        f" engine.name=pipeline ({stages} stages x {replicas} replicas,"
        f" {config.pipeline.schedule})"
    )


def _replicas_problem(config: Config, world_size: int) -> Optional[Problem]:
    replicas = config.batch.replicas
    if replicas % world_size == 0:
        return None
    return Problem(
        f"batch.replicas={replicas},",
        f"but torchrun started {world_size} processes; the torch engine needs the same number of"
        " replicas, one or more, in each process.",
        advice=f"Set batch.replicas={world_size} (and divide batch.gradient_accumulation to keep"
        " the global batch), start one process per replica (torchrun --nproc-per-node"
        f" {replicas}), or cut the model into stages: engine.name=pipeline.",
    )


def _world_problem(config: Config, world_size: int) -> Optional[Problem]:
    stages, replicas = len(config.pipeline.layers_per_stage), config.batch.replicas
    legal = [stages * replicas]
    if config.pipeline.schedule == "interleaved_1f1b":
        legal += [stages // n * replicas for n in range(2, stages) if stages % n == 0]
    if legal[0] == 1:
        return Problem(
            "engine.name=pipeline",
            "with one stage and one replica is a single process.",
            advice="Set engine.name=torch.",
        )
    if world_size in legal:
        return None
    if world_size == 1:
        instead = "compute in one process: engine.name=torch"
    else:
        instead = "change pipeline.layers_per_stage or batch.replicas"
    also = f" (or {', '.join(map(str, legal[1:]))}, several stages each)" if legal[1:] else ""
    return Problem(
        "engine.name=pipeline",
        f"needs {legal[0]} processes = {stages} stages x {replicas} replicas{also}, and there"
        f" {'is' if world_size == 1 else 'are'} {world_size}.",
        advice=f"Start it with torchrun --nproc-per-node {legal[0]}, or {instead}.",
    )


def schedule_problem(config: Config, processes: int) -> Optional[Problem]:
    """Return why torch's schedule cannot run on `processes` processes per replica, or None."""
    schedule, stages = config.pipeline.schedule, len(config.pipeline.layers_per_stage)
    count = BatchPlan.from_section(config.batch).gradient_accumulation
    given = given_accumulation(config.batch, count)
    if schedule == "1f1b" and count < stages:
        return Problem(
            given,
            f"is less than the {stages} stages, and pipeline.schedule=1f1b must fill them.",
            f"Smallest legal value: {stages}.",
            "(Or pipeline.schedule=gpipe.)",
        )
    if schedule == "interleaved_1f1b" and not _has_whole_rounds(count, processes):
        below = [n for n in range(count, 0, -1) if _has_whole_rounds(n, processes)][:1]
        above = next(
            n for n in range(count, count + processes + 1) if _has_whole_rounds(n, processes)
        )
        return Problem(
            given,
            f"does not go round {processes} processes: pipeline.schedule=interleaved_1f1b divides"
            f" the micro-batches evenly into {max(1, count // processes)} rounds.",
            f"Nearest legal values: {' or '.join(map(str, [*below, above]))}.",
        )
    return None


def _has_whole_rounds(count: int, processes: int) -> bool:
    """Whether torch's ScheduleInterleaved1F1B accepts this number of micro-batches."""
    return count % max(1, count // processes) == 0
