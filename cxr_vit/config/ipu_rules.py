"""Rules of PopTorch and of the IPU, checked before any compilation (docs/ipu.md)."""

from __future__ import annotations

import math
from typing import Iterator, List, Optional, Union

from cxr_vit.config.plans import BatchPlan, empty_stage_problem, given_accumulation
from cxr_vit.config.schema import Config
from cxr_vit.errors import ConfigError, Problem

#: PopTorch's limit for one process.
MOST_IPUS = 64
#: Tiles that may be reserved for input and output (TensorLocations.numIOTiles).
LEAST_IO_TILES, MOST_IO_TILES = 32, 192


def ipu_problems(config: Config, *, replicas: Optional[int] = None) -> List[Problem]:
    """Return everything that PopTorch refuses in a configuration.

    `replicas` is the number of one process; None means `batch.replicas`, which holds without
    poprun.
    """
    problems = [
        *_pipeline_problems(config),
        *_engine_problems(config),
        *_training_problems(config),
        *_proportion_problems(config),
        *_arithmetic_problems(config),
    ]
    of_process = process_problem(config, config.batch.replicas if replicas is None else replicas)
    return [*problems, of_process] if of_process else problems


def check_ipu(config: Config, hint: str = "", *, replicas: Optional[int] = None) -> None:
    """Raise ConfigError with all of `ipu_problems`, followed by `hint`."""
    problems = ipu_problems(config, replicas=replicas)
    if problems:
        raise ConfigError("\n".join(map(str, problems)) + hint)


def process_problem(config: Config, replicas: int) -> Optional[Problem]:
    """Return the problem of a process with more IPUs than PopTorch allows, or None."""
    stages = max(len(config.pipeline.layers_per_stage), len(eval_layers(config)))
    if stages * replicas <= MOST_IPUS:
        return None
    advice = f"Cut the model into {MOST_IPUS} stages or fewer."
    if stages <= MOST_IPUS:
        advice = (
            f"Start {-(-stages * replicas // MOST_IPUS)} or more with poprun (docs/ipu.md), or set"
            f" batch.replicas={MOST_IPUS // stages} or fewer."
        )
    return Problem(
        f"{stages} stages x {replicas} replicas",
        f"are {stages * replicas} IPUs, and one process has at most {MOST_IPUS}.",
        advice=advice,
    )


def reserved_ipus(stages: int, replicas: int) -> int:
    """Return how many IPUs PopTorch reserves: the next power of two (autoRoundNumIPUs)."""
    return 1 << math.ceil(math.log2(stages * replicas))


def eval_layers(config: Config) -> List[int]:
    """Return the encoder layers of each stage in evaluation."""
    return config.pipeline.eval_layers_per_stage or config.pipeline.layers_per_stage


def eval_proportion(config: Config) -> Union[float, List[float], None]:
    """Return the memory proportion, or one per stage, in evaluation."""
    own = config.pipeline.eval_available_memory_proportion
    return config.pipeline.available_memory_proportion if own is None else own


def _pipeline_problems(config: Config) -> Iterator[Problem]:
    """Yield pipelines that the micro-batches do not fill, and IPUs without work."""
    pipeline, section = config.pipeline, config.batch
    batch = BatchPlan.from_section(section)
    ipus, eval_ipus = len(pipeline.layers_per_stage), len(eval_layers(config))
    least, given = 2 * ipus - 1, batch.gradient_accumulation
    if pipeline.execution == "pipelined" and given < least:
        unit = 1 if section.global_batch_size is None else batch.micro_batch_size * batch.replicas
        yield Problem(
            given_accumulation(section, given),
            f"is less than the {least} pipeline stages (2 x {ipus} IPUs - 1) that training over"
            f" {ipus} IPUs has; PopTorch refuses it.",
            f"Smallest legal value: {least * unit}.",
            "(Or pipeline.execution=sharded.)",
        )
    if pipeline.eval_execution == "pipelined" and batch.eval_device_iterations < eval_ipus:
        yield Problem(
            f"batch.eval_device_iterations={batch.eval_device_iterations}",
            f"is less than the {eval_ipus} pipeline stages that evaluation over {eval_ipus} IPUs"
            " has; PopTorch refuses it.",
            f"Smallest legal value: {eval_ipus}.",
            "(Or pipeline.eval_execution=sharded.)",
        )
    empty = empty_stage_problem(pipeline.layers_per_stage, place="IPU") or empty_stage_problem(
        eval_layers(config), key="eval_layers_per_stage", place="IPU"
    )
    if empty:
        yield empty


def _engine_problems(config: Config) -> Iterator[Problem]:
    engine = config.engine
    tiles = engine.popart_options.get("numIOTiles")
    if tiles and (tiles % 2 or not LEAST_IO_TILES <= tiles <= MOST_IO_TILES):
        nearest = min(max(tiles // 2 * 2, LEAST_IO_TILES), MOST_IO_TILES)
        legal = f"{nearest} or {nearest + 2}" if nearest < tiles < MOST_IO_TILES else nearest
        yield Problem(
            f"engine.popart_options.numIOTiles={tiles}",
            f"is not an even number from {LEAST_IO_TILES} to {MOST_IO_TILES}.",
            f"Nearest legal values: {legal}.",
        )
    if engine.replicated_tensor_sharding and config.batch.replicas == 1:
        yield Problem(
            "engine.replicated_tensor_sharding=true",
            "divides the optimizer state among replicas, and batch.replicas=1.",
            advice="Set it to false, or batch.replicas to 2 or more.",
        )
    if engine.device != "auto":
        yield Problem(
            f"engine.device={engine.device}",
            "is a device of torch; IPUs are chosen by engine.name.",
            advice="Leave engine.device out.",
        )
    if engine.precision == "bf16":
        yield Problem("engine.precision=bf16:", "an IPU has no bf16.", "Set fp16 or fp32.")
    if engine.precision == "fp32" and engine.weights == "fp16":
        yield Problem(
            "engine.weights=fp16 with engine.precision=fp32:",
            "fp16 weights compute in fp16.",
            "Set engine.precision=fp16 or engine.weights=fp32.",
        )


def _training_problems(config: Config) -> Iterator[Problem]:
    if config.train.on_nonfinite == "skip_update":
        yield Problem(
            "train.on_nonfinite=skip_update:",
            "the update is compiled for the IPU and cannot be left out.",
            "Set stop.",
            "(A scale of optim.loss_scaling that is too large is the usual cause.)",
        )


def _proportion_problems(config: Config) -> Iterator[Problem]:
    given = config.pipeline.available_memory_proportion
    training, evaluation = len(config.pipeline.layers_per_stage), len(eval_layers(config))
    if not isinstance(given, list):
        return
    if len(given) != training:
        yield Problem(
            f"pipeline.available_memory_proportion={given}",
            f"has {len(given)} numbers; there are {training} stages.",
            "Give one number per stage, or a single number for all.",
        )
    elif evaluation > training:
        yield Problem(
            f"pipeline.available_memory_proportion={given}",
            f"has one number for each of the {training} stages of training, but evaluation has"
            f" {evaluation}.",
            "Give a single number for all.",
        )


def _arithmetic_problems(config: Config) -> Iterator[Problem]:
    optim = config.optim
    if config.model.hidden_act == "gelu":
        yield Problem(
            "model.hidden_act=gelu:",
            "an IPU computes GELU in its tanh form only.",
            "Set gelu_pytorch_tanh, or leave it null.",
        )
    if optim.max_grad_norm is not None and optim.name != "adamw":
        what = "does not clip" if optim.name == "lamb" else "clips the velocity, not the gradient,"
        yield Problem(
            f"optim.max_grad_norm={optim.max_grad_norm} with optim.name={optim.name}:",
            f"PopART {what} there.",
            advice="Set optim.max_grad_norm=null, or optim.name=adamw.",
        )
    if optim.loss_scaling == "auto" and config.engine.precision == "fp32":
        yield Problem(
            "optim.loss_scaling=auto",
            "watches fp16 gradients, and engine.precision=fp32 has none.",
            advice="Set optim.loss_scaling=1.0.",
        )
