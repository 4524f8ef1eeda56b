"""Rules of PopTorch and of the IPU, checked before any compilation (docs/ipu.md)."""

from __future__ import annotations

import math
from typing import Callable, List, Optional, Tuple

from cxr_vit.config.plans import BatchPlan, empty_stage_problem, given_accumulation
from cxr_vit.config.schema import Config
from cxr_vit.errors import ConfigError, Problem

__all__ = ["check_ipu", "eval_layers", "ipu_problems", "process_problem", "reserved_ipus"]

#: PopTorch's limit for one process.
MOST_IPUS = 64
#: Tiles that may be reserved for input and output (TensorLocations.numIOTiles).
LEAST_IO_TILES, MOST_IO_TILES = 32, 192


def ipu_problems(config: Config, *, replicas: Optional[int] = None) -> List[Problem]:
    """Return everything that PopTorch refuses in a configuration.

    Parameters
    ----------
    replicas
        Replicas of one process; None for `batch.replicas`, which holds without poprun.
    """
    own = config.batch.replicas if replicas is None else replicas
    found = [rule(config) for rule in RULES] + [process_problem(config, own)]
    return [problem for problem in found if problem]


def check_ipu(config: Config, hint: str = "", *, replicas: Optional[int] = None) -> None:
    """Raise if PopTorch refuses the configuration.

    Parameters
    ----------
    hint
        Text after the last message.
    replicas
        As in `ipu_problems`.

    Raises
    ------
    ConfigError
        Listing every broken rule.
    """
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


def _accumulation_fills_the_pipeline(config: Config) -> Optional[Problem]:
    ipus = len(config.pipeline.layers_per_stage)
    batch, least = BatchPlan.from_section(config.batch), 2 * ipus - 1
    if config.pipeline.execution == "sharded" or batch.gradient_accumulation >= least:
        return None
    by_global_batch = config.batch.global_batch_size is not None
    legal = least * batch.micro_batch_size * batch.replicas if by_global_batch else least
    return Problem(
        given_accumulation(config.batch, batch.gradient_accumulation),
        f"is less than the {least} pipeline stages (2 x {ipus} IPUs - 1) that training over {ipus}"
        " IPUs has; PopTorch refuses it.",
        f"Smallest legal value: {legal}.",
        "(Or pipeline.execution=sharded.)",
    )


def _iterations_fill_the_eval_pipeline(config: Config) -> Optional[Problem]:
    ipus = len(eval_layers(config))
    given = config.batch.eval_device_iterations
    if config.pipeline.eval_execution == "sharded" or given >= ipus:
        return None
    return Problem(
        f"batch.eval_device_iterations={given}",
        f"is less than the {ipus} pipeline stages that evaluation over {ipus} IPUs has; PopTorch"
        " refuses it.",
        f"Smallest legal value: {ipus}.",
        "(Or pipeline.eval_execution=sharded.)",
    )


def _no_ipu_is_empty(config: Config) -> Optional[Problem]:
    pipeline = config.pipeline
    return empty_stage_problem(pipeline.layers_per_stage, place="IPU") or empty_stage_problem(
        eval_layers(config), key="eval_layers_per_stage", place="IPU"
    )


def _io_tiles_are_legal(config: Config) -> Optional[Problem]:
    given = config.engine.popart_options.get("numIOTiles")
    if not given or (given % 2 == 0 and LEAST_IO_TILES <= given <= MOST_IO_TILES):
        return None
    nearest = min(max(given // 2 * 2, LEAST_IO_TILES), MOST_IO_TILES)
    legal = [str(n) for n in (nearest, nearest + 2) if n <= MOST_IO_TILES and given > nearest]
    return Problem(
        f"engine.popart_options.numIOTiles={given}",
        f"is not an even number from {LEAST_IO_TILES} to {MOST_IO_TILES}.",
        f"Nearest legal values: {' or '.join(legal or [str(nearest)])}.",
    )


def _sharding_has_replicas(config: Config) -> Optional[Problem]:
    if not config.engine.replicated_tensor_sharding or config.batch.replicas > 1:
        return None
    return Problem(
        "engine.replicated_tensor_sharding=true",
        "divides the optimizer state among replicas, and batch.replicas=1.",
        advice="Set it to false, or batch.replicas to 2 or more.",
    )


def _device_is_the_ipu(config: Config) -> Optional[Problem]:
    if config.engine.device == "auto":
        return None
    return Problem(
        f"engine.device={config.engine.device}",
        "is a device of torch; IPUs are chosen by engine.name.",
        advice="Leave engine.device out.",
    )


def _arithmetic_is_the_ipus(config: Config) -> Optional[Problem]:
    engine = config.engine
    if engine.precision == "bf16":
        return Problem("engine.precision=bf16:", "an IPU has no bf16.", "Set fp16 or fp32.")
    if engine.precision == "fp32" and engine.weights == "fp16":
        return Problem(
            "engine.weights=fp16 with engine.precision=fp32:",
            "fp16 weights compute in fp16.",
            "Set engine.precision=fp16 or engine.weights=fp32.",
        )
    return None


def _every_stage_has_a_proportion(config: Config) -> Optional[Problem]:
    given = config.pipeline.available_memory_proportion
    training, evaluation = len(config.pipeline.layers_per_stage), len(eval_layers(config))
    if not isinstance(given, list):
        return None
    if len(given) != training:
        return Problem(
            f"pipeline.available_memory_proportion={given}",
            f"has {len(given)} numbers; there are {training} stages.",
            "Give one number per stage, or a single number for all.",
        )
    if evaluation > training:
        return Problem(
            f"pipeline.available_memory_proportion={given}",
            f"has one number for each of the {training} stages of training, but evaluation has"
            f" {evaluation}.",
            "Give a single number for all.",
        )
    return None


def _activation_is_the_ipus(config: Config) -> Optional[Problem]:
    if config.model.hidden_act != "gelu":
        return None
    return Problem(
        "model.hidden_act=gelu:",
        "an IPU computes GELU in its tanh form only.",
        "Set gelu_pytorch_tanh, or leave it null.",
    )


def _clipping_is_of_gradients(config: Config) -> Optional[Problem]:
    optim = config.optim
    if optim.max_grad_norm is None or optim.name == "adamw":
        return None
    what = "does not clip" if optim.name == "lamb" else "clips the velocity, not the gradient,"
    return Problem(
        f"optim.max_grad_norm={optim.max_grad_norm} with optim.name={optim.name}:",
        f"PopART {what} there.",
        advice="Set optim.max_grad_norm=null, or optim.name=adamw.",
    )


def _scaled_loss_has_fp16_gradients(config: Config) -> Optional[Problem]:
    if config.optim.loss_scaling != "auto" or config.engine.precision != "fp32":
        return None
    return Problem(
        "optim.loss_scaling=auto",
        "watches fp16 gradients, and engine.precision=fp32 has none.",
        advice="Set optim.loss_scaling=1.0.",
    )


RULES: Tuple[Callable[[Config], Optional[Problem]], ...] = (
    _accumulation_fills_the_pipeline,
    _iterations_fill_the_eval_pipeline,
    _no_ipu_is_empty,
    _io_tiles_are_legal,
    _sharding_has_replicas,
    _device_is_the_ipu,
    _arithmetic_is_the_ipus,
    _every_stage_has_a_proportion,
    _activation_is_the_ipus,
    _clipping_is_of_gradients,
    _scaled_loss_has_fp16_gradients,
)
