"""What PopTorch would refuse, known before any compilation (poptorch.md, section 0).

Imports no torch.
"""

from __future__ import annotations

import math
from typing import Callable, List, Optional, Tuple

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.errors import ConfigError

__all__ = ["check_ipu", "eval_layers", "ipu_problems", "process_problem", "reserved_ipus"]

#: PopTorch's limit for one process.
MOST_IPUS = 64
#: Tiles that may be set aside for input and output (TensorLocations.numIOTiles).
LEAST_IO_TILES, MOST_IO_TILES = 32, 192


def eval_layers(config: Config) -> List[int]:
    """Return the cut in evaluation."""
    return config.pipeline.eval_layers_per_stage or config.pipeline.layers_per_stage


def _accumulation_fills_the_pipeline(config: Config) -> Optional[str]:
    ipus = len(config.pipeline.layers_per_stage)
    batch, least = BatchPlan.from_section(config.batch), 2 * ipus - 1
    given = batch.gradient_accumulation
    if config.pipeline.execution == "sharded" or given >= least:
        return None
    key, legal = f"batch.gradient_accumulation={given}", least
    if config.batch.global_batch_size is not None:
        key = (
            f"batch.global_batch_size={config.batch.global_batch_size}, an accumulation of {given},"
        )
        legal = least * batch.micro_batch_size * batch.replicas
    return (
        f"{key} is less than the {least} pipeline stages (2 x {ipus} IPUs - 1) that training over"
        f" {ipus} IPUs has; PopTorch refuses it. Smallest legal value: {legal}."
        " (Or pipeline.execution=sharded.)"
    )


def _iterations_fill_the_eval_pipeline(config: Config) -> Optional[str]:
    ipus = len(eval_layers(config))
    given = config.batch.eval_device_iterations
    if config.pipeline.eval_execution == "sharded" or given >= ipus:
        return None
    return (
        f"batch.eval_device_iterations={given} is less than the {ipus} pipeline stages that"
        f" evaluation over {ipus} IPUs has; PopTorch refuses it. Smallest legal value: {ipus}."
        " (Or pipeline.eval_execution=sharded.)"
    )


def _no_ipu_is_empty(config: Config) -> Optional[str]:
    for key in ("layers_per_stage", "eval_layers_per_stage"):
        layers = getattr(config.pipeline, key)
        if layers and 0 in layers[1:-1]:
            empty = layers.index(0, 1)
            return (
                f"pipeline.{key}={layers} leaves IPU {empty} without work. Only the first stage"
                " (embedding) and the last (head) may have 0 layers."
            )
    return None


def _io_tiles_are_legal(config: Config) -> Optional[str]:
    given = config.engine.popart_options.get("numIOTiles")
    if not given or (given % 2 == 0 and LEAST_IO_TILES <= given <= MOST_IO_TILES):
        return None
    nearest = min(max(given // 2 * 2, LEAST_IO_TILES), MOST_IO_TILES)
    legal = [str(n) for n in (nearest, nearest + 2) if n <= MOST_IO_TILES and given > nearest]
    return (
        f"engine.popart_options.numIOTiles={given}: PopTorch takes even numbers from"
        f" {LEAST_IO_TILES} to {MOST_IO_TILES}. Nearest legal values:"
        f" {' or '.join(legal or [str(nearest)])}."
    )


def _sharding_has_replicas(config: Config) -> Optional[str]:
    if not config.engine.replicated_tensor_sharding or config.batch.replicas > 1:
        return None
    return (
        "engine.replicated_tensor_sharding=true shares the optimizer's state out over replicas, and"
        " batch.replicas=1. Set it to false, or batch.replicas to 2 or more."
    )


def _device_is_the_ipu(config: Config) -> Optional[str]:
    if config.engine.device == "auto":
        return None
    return (
        f"engine.device={config.engine.device} names a device of torch; IPUs are engine.name."
        " Leave engine.device out."
    )


def _arithmetic_is_the_ipus(config: Config) -> Optional[str]:
    engine = config.engine
    if engine.precision == "bf16":
        return "engine.precision=bf16: an IPU has no bf16. Set fp16 or fp32."
    if engine.precision == "fp32" and engine.weights == "fp16":
        return (
            "engine.weights=fp16 with engine.precision=fp32: fp16 weights compute in fp16. Set"
            " engine.precision=fp16 or engine.weights=fp32."
        )
    return None


def _every_stage_has_a_proportion(config: Config) -> Optional[str]:
    given = config.pipeline.available_memory_proportion
    stages = len(config.pipeline.layers_per_stage)
    if not isinstance(given, list) or len(given) == stages:
        return None
    return (
        f"pipeline.available_memory_proportion={given} has {len(given)} numbers; there are {stages}"
        " stages. Give one a stage, or a single number for all."
    )


def _evaluation_has_proportions(config: Config) -> Optional[str]:
    given = config.pipeline.available_memory_proportion
    stages, training = len(eval_layers(config)), len(config.pipeline.layers_per_stage)
    if not isinstance(given, list) or stages <= training:
        return None
    return (
        f"pipeline.available_memory_proportion has one number for each of the {training} stages of"
        f" training, but evaluation has {stages}. Give a single number for all."
    )


def _activation_is_the_ipus(config: Config) -> Optional[str]:
    if config.model.hidden_act != "gelu":
        return None
    return (
        "model.hidden_act=gelu: an IPU computes GELU in its tanh form only. Set gelu_pytorch_tanh,"
        " or leave it null."
    )


def _clipping_is_of_gradients(config: Config) -> Optional[str]:
    optim = config.optim
    if optim.max_grad_norm is None or optim.name == "adamw":
        return None
    what = "does not clip" if optim.name == "lamb" else "clips the velocity, not the gradient,"
    return (
        f"optim.max_grad_norm={optim.max_grad_norm} with optim.name={optim.name}: PopART {what}"
        " there. Set optim.max_grad_norm=null, or optim.name=adamw."
    )


def _scaled_loss_has_fp16_gradients(config: Config) -> Optional[str]:
    if config.optim.loss_scaling != "auto" or config.engine.precision != "fp32":
        return None
    return (
        "optim.loss_scaling=auto watches fp16 gradients, and engine.precision=fp32 has none. Set"
        " optim.loss_scaling=1.0."
    )


RULES: Tuple[Callable[[Config], Optional[str]], ...] = (
    _accumulation_fills_the_pipeline,
    _iterations_fill_the_eval_pipeline,
    _no_ipu_is_empty,
    _io_tiles_are_legal,
    _sharding_has_replicas,
    _device_is_the_ipu,
    _arithmetic_is_the_ipus,
    _every_stage_has_a_proportion,
    _evaluation_has_proportions,
    _activation_is_the_ipus,
    _clipping_is_of_gradients,
    _scaled_loss_has_fp16_gradients,
)


def process_problem(config: Config, replicas: int) -> Optional[str]:
    """Say that a process cannot drive so many replicas, or return None."""
    stages = max(len(config.pipeline.layers_per_stage), len(eval_layers(config)))
    if stages * replicas <= MOST_IPUS:
        return None
    remedy = f"Cut the model into {MOST_IPUS} stages or fewer."
    if stages <= MOST_IPUS:
        remedy = (
            f"Start {-(-stages * replicas // MOST_IPUS)} or more with poprun (docs/ipu.md), or set"
            f" batch.replicas={MOST_IPUS // stages} or fewer."
        )
    return (
        f"{stages} stages x {replicas} replicas are {stages * replicas} IPUs, and one process has"
        f" at most {MOST_IPUS}. {remedy}"
    )


def ipu_problems(config: Config, *, replicas: Optional[int] = None) -> List[str]:
    """Return what PopTorch would refuse, a message each.

    Parameters
    ----------
    config
        The configuration.
    replicas
        Of one process; None for `batch.replicas`, which is all there are without poprun.
    """
    own = config.batch.replicas if replicas is None else replicas
    found = [rule(config) for rule in RULES] + [process_problem(config, own)]
    return [problem for problem in found if problem]


def check_ipu(config: Config, hint: str = "", *, replicas: Optional[int] = None) -> None:
    """Raise if PopTorch would refuse the configuration.

    Parameters
    ----------
    config
        The configuration.
    hint
        Added to the last message.
    replicas
        As in `ipu_problems`.

    Raises
    ------
    ConfigError
        Listing every broken rule.
    """
    problems = ipu_problems(config, replicas=replicas)
    if problems:
        raise ConfigError("\n".join(problems) + hint)


def reserved_ipus(stages: int, replicas: int) -> int:
    """Return how many IPUs PopTorch reserves: the next power of two (autoRoundNumIPUs)."""
    return 1 << math.ceil(math.log2(stages * replicas))
