"""What a device's memory has to hold of its stage, by category. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

from cxr_vit.config import BatchPlan, Config
from cxr_vit.planner.costs import ModelShape, StageCost
from cxr_vit.planner.hardware import (
    CODE_BYTES,
    DEFAULT_PROPORTION,
    IMBALANCE,
    MEMORY_UNCERTAINTY,
    Hardware,
)

__all__ = ["CATEGORIES", "Formats", "StageMemory", "stage_memory"]

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
#: PopART shards only tensors of so many elements (sessionoptions.hpp,
#: minElementsForReplicatedTensorSharding).
_LEAST_SHARDED = 8192
#: Bytes that torch saves of an activation under autocast: some in fp32, some in 16 bits (measured
#: with saved_tensors_hooks; tests/planner/test_costs.py).
_AUTOCAST_BYTES = 2.5

#: The parts of `StageMemory` in the order of the reports, with what they are called there.
CATEGORIES = {
    "weights": "weights",
    "accumulators": "gradient accumulators",
    "optimizer": "optimizer state",
    "stash": "activation stash",
    "live": "live in backward",
    "transient": "transient of products",
    "io": "input and output",
    "code": "code",
    "uneven": "unevenness of tiles",
}


class Formats(NamedTuple):
    """Bytes of an element of each kind, and where the optimizer's state lies.

    Attributes
    ----------
    proportion
        Part of the memory that a product's working data may take; None for PopLibs' own.
    shards
        Replicas that share the optimizer's state out among them: those of one process
        (PopTorch, Compiler.cpp:740).
    accumulates
        Whether gradients are added up over several micro-batches.
    """

    activation: float
    weight: int
    partial: int
    accumulator: int
    moments: int
    on_chip: bool
    shards: int
    accumulates: bool
    proportion: Optional[Tuple[float, ...]]

    @classmethod
    def from_config(
        cls, config: Config, hardware: Hardware, local_replicas: Optional[int] = None
    ) -> Formats:
        """Read them off a configuration; one process has all replicas where nothing is said."""
        optim, engine, batch = config.optim, config.engine, config.batch
        accumulates = BatchPlan.from_section(batch).gradient_accumulation > 1
        has_momentum = optim.name != "sgd" or optim.momentum > 0
        if not hardware.is_ipu:
            moments = 8 if optim.name != "sgd" else 4 * has_momentum
            activation = 4.0 if engine.precision == "fp32" else _AUTOCAST_BYTES
            return cls(activation, 4, 4, 4, moments, True, 1, True, None)
        precision = "fp32" if engine.precision == "fp32" else "fp16"
        moments = _BYTES[optim.first_moment] * has_momentum
        if optim.name != "sgd":
            moments += _BYTES[optim.second_moment]
        return cls(
            activation=_BYTES[precision],
            weight=_BYTES[engine.weights],
            partial=_BYTES[engine.partials if precision == "fp16" else "fp32"],
            accumulator=_BYTES[optim.accumulator],
            moments=moments,
            on_chip=engine.optimizer_state_on_chip,
            shards=(local_replicas or batch.replicas) if engine.replicated_tensor_sharding else 1,
            accumulates=accumulates,
            proportion=_proportions(config),
        )


def _proportions(config: Config) -> Optional[Tuple[float, ...]]:
    """Return one a stage; of a list of another length, which is refused, the last goes on."""
    given = config.pipeline.available_memory_proportion
    stages = len(config.pipeline.layers_per_stage)
    if given is None:
        return None
    each = given if isinstance(given, list) else [given]
    return tuple(each[min(stage, len(each) - 1)] for stage in range(stages))


class StageMemory(NamedTuple):
    """Bytes of a stage on its device, by category, and what the device has."""

    weights: float
    accumulators: float
    optimizer: float
    stash: float
    live: float
    transient: float
    io: float
    code: float
    uneven: float
    limit: float

    @property
    def total(self) -> float:
        """What the device must have, bytes: on an IPU the fullest tile times their number."""
        return sum(self[:-1])

    @property
    def share(self) -> float:
        """The total over what the device has."""
        return self.total / self.limit

    @property
    def headroom(self) -> float:
        """What is left, bytes; negative where it does not fit."""
        return self.limit - self.total

    @property
    def fits(self) -> bool:
        """Whether it is predicted to fit, however closely."""
        return self.share <= 1

    @property
    def verdict(self) -> str:
        """Say whether it fits, given the uncertainty of the prediction."""
        if self.share * (1 + MEMORY_UNCERTAINTY) <= 1:
            return "fits"
        if self.fits:
            return "fits, closely"
        return "may not fit" if self.share * (1 - MEMORY_UNCERTAINTY) <= 1 else "does not fit"


def stage_memory(
    cost: StageCost,
    shape: ModelShape,
    formats: Formats,
    hardware: Hardware,
    *,
    stage: int,
    depth: int,
    micro_batch_size: int,
) -> StageMemory:
    """Predict what a stage takes of its device.

    Parameters
    ----------
    cost
        What the stage costs.
    shape
        The model's.
    formats
        Of the configuration.
    hardware
        The device.
    stage
        Which stage it is.
    depth
        How many micro-batches it holds at most (`timeline.in_flight`).
    micro_batch_size
        Films of a micro-batch.
    """
    border = shape.image_bytes * cost.is_first + 4 * shape.num_labels * cost.is_last
    own_input: float = shape.image_bytes
    if not cost.is_first:
        own_input = shape.hidden_elements * formats.activation
    kept = cost.kept * formats.activation
    if not hardware.is_ipu:  # nothing is computed again, and no attention is kept
        attention = shape.num_heads * shape.tokens**2
        kept = cost.num_layers * (shape.layer_activations() - attention) * formats.activation
    filled = StageMemory(
        weights=formats.weight * cost.parameters,
        accumulators=formats.accumulator * cost.parameters * formats.accumulates,
        optimizer=_optimizer_bytes(cost, formats),
        stash=depth * micro_batch_size * (own_input + kept),
        live=micro_batch_size * cost.live * formats.activation,
        transient=_transient_bytes(cost, shape, formats, hardware, stage, micro_batch_size),
        io=micro_batch_size * (border + cost.passed * formats.activation),
        code=CODE_BYTES.value,
        uneven=0.0,
        limit=hardware.memory_bytes,
    )
    if hardware.is_ipu:
        return filled._replace(uneven=(IMBALANCE.value - 1) * filled.total)
    gradients = micro_batch_size * shape.layer_gradients() * formats.activation
    cast = 2.0 * cost.parameters if formats.activation < formats.weight else 0.0
    return filled._replace(live=gradients, transient=cast, code=0.0)


def _optimizer_bytes(cost: StageCost, formats: Formats) -> float:
    """Return the bytes of the moments; off the chip, those of the tensor that is being updated."""
    if not formats.on_chip:
        return formats.moments * max(cost.tensors)
    sharded = sum(size for size in cost.tensors if size >= _LEAST_SHARDED)
    whole = cost.parameters - sharded
    return formats.moments * (whole + sharded / formats.shards)


def _transient_bytes(
    cost: StageCost,
    shape: ModelShape,
    formats: Formats,
    hardware: Hardware,
    stage: int,
    films: int,
) -> float:
    """Return the working data of the largest product, and the weights cast for one layer.

    A product of m x k by k x n, spread over T tiles so that least is moved, takes 3 (mkn)^(2/3)
    T^(1/3) elements: its two factors and its partial sums (Irony, Toledo, Tiskin 2004). PopLibs may
    take more, up to the memory proportion, to be faster.
    """
    most = DEFAULT_PROPORTION.value
    if formats.proportion is not None:
        most = formats.proportion[stage]
    product = films * (
        shape.largest_product()
        if cost.num_layers
        else cost.forward_flops // 2  # the embedding's or the head's alone
    )
    least = (2 * formats.activation + formats.partial) * (
        product ** (2 / 3) * hardware.tiles.value ** (1 / 3)
    )
    cast = 0.0
    if formats.activation < formats.weight and cost.num_layers:
        cast = formats.activation * sum(shape.layer_tensors())
    transient: float = min(most * hardware.memory_bytes, least) + cast
    return transient
