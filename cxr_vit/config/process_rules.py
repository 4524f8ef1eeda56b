"""What the processes that torchrun starts must be for a configuration. Imports no torch."""

from __future__ import annotations

from typing import List, Optional

from cxr_vit.config.batching import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.errors import ConfigError

__all__ = ["check_processes", "describe_processes", "schedule_problem"]


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
