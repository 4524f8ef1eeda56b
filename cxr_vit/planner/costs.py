"""What the parts of a ViT cost: parameters, operations and bytes, from its shape alone.

Counted exactly: parameters, matrix products, and what a pipeline keeps of a stage. Estimated: what
is live while a layer is differentiated. Imports no torch.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.architectures import known_architecture
from cxr_vit.data.labels import label_names
from cxr_vit.errors import ConfigError
from cxr_vit.planner.hardware import (
    CODE_BYTES,
    DEFAULT_PROPORTION,
    IMBALANCE,
    MEMORY_UNCERTAINTY,
    Hardware,
)

__all__ = [
    "CATEGORIES",
    "Formats",
    "ModelShape",
    "StageCost",
    "StageMemory",
    "stage_cost",
    "stage_memory",
]


#: Operations of a multiplication and an addition.
_MULTIPLY_ADD = 2


class ModelShape(NamedTuple):
    """The sizes of a ViT and of the images it takes.

    `image_bytes` is what an image takes as it crosses to the device.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    patch_size: int
    num_channels: int
    image_size: int
    num_labels: int
    image_bytes: int

    @classmethod
    def from_config(cls, config: Config) -> ModelShape:
        """Read the shape off a configuration.

        Raises
        ------
        ConfigError
            If `model.name` does not tell it without being loaded.
        """
        found = known_architecture(config.model.name)
        if found is None:
            raise ConfigError(
                f"model.name={config.model.name} does not tell its size, and nothing is loaded to"
                " plan. Give a size (vit-base, ...), a hub name such as"
                " google/vit-base-patch16-224-in21k, or a folder with its config.json."
            )
        size = config.data.image_size
        return cls(
            hidden_size=found.hidden_size,
            num_layers=found.num_layers,
            num_heads=found.num_heads,
            mlp_size=found.mlp_size,
            patch_size=found.patch_size or config.model.patch_size,
            num_channels=found.num_channels,
            image_size=size,
            num_labels=len(label_names(include_no_finding=config.data.include_no_finding)),
            image_bytes=size * size,  # one gray byte a pixel
        )

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def hidden_elements(self) -> int:
        """Elements of the hidden states of one image."""
        return self.tokens * self.hidden_size

    def embedding_tensors(self) -> List[int]:
        """Elements of each parameter of the embedding."""
        pixels = self.num_channels * self.patch_size**2
        width = self.hidden_size
        return [width * pixels, width, width, self.hidden_elements]

    def layer_tensors(self) -> List[int]:
        """Elements of each parameter of an encoder layer."""
        width, mlp = self.hidden_size, self.mlp_size
        attention = [width * width, width] * 4
        return [*attention, width * mlp, mlp, mlp * width, width, *[width] * 4]

    def head_tensors(self) -> List[int]:
        """Elements of each parameter of the last layer norm and the classifier."""
        width = self.hidden_size
        return [width, width, width * self.num_labels, self.num_labels]

    def embedding_flops(self) -> int:
        """Operations of the embedding's matrix products on one image, forward."""
        pixels = self.num_channels * self.patch_size**2
        return _MULTIPLY_ADD * (self.tokens - 1) * pixels * self.hidden_size

    def layer_flops(self) -> int:
        """Operations of an encoder layer's matrix products on one image, forward."""
        tokens, width = self.tokens, self.hidden_size
        projections = 4 * tokens * width * width
        attention = 2 * tokens * tokens * width
        return _MULTIPLY_ADD * (projections + attention + 2 * tokens * width * self.mlp_size)

    def head_flops(self) -> int:
        """Operations of the classifier's matrix product on one image, forward."""
        return _MULTIPLY_ADD * self.hidden_size * self.num_labels

    def layer_activations(self) -> int:
        """Elements that the backward pass of an encoder layer needs of one image, plain attention.

        With s tokens, width h, MLP m and a heads: input and output of both layer norms, query, key,
        value, context (8 sh), both sides of the activation (2 sm) and the attention's probabilities
        (a s^2). What torch saves for it is the same number (tests/planner/test_costs.py).
        """
        attention = self.num_heads * self.tokens**2
        return 8 * self.hidden_elements + 2 * self.tokens * self.mlp_size + attention

    def layer_gradients(self) -> int:
        """Elements of one image's gradients at the peak of a layer's backward pass.

        Those of the residual stream and of the MLP's hidden layer, while all activations are there.
        """
        return self.hidden_elements + self.tokens * self.mlp_size

    def largest_product(self) -> int:
        """Multiplications of a layer's largest matrix product on one image."""
        return self.tokens * self.hidden_size * max(self.mlp_size, self.hidden_size)


class StageCost(NamedTuple):
    """What one stage costs; all but the parameters for one image.

    Attributes
    ----------
    num_layers
        Encoder layers.
    tensors
        Elements of each parameter.
    forward_flops, recompute_flops, backward_flops
        Operations of the matrix products.
    kept
        Elements that a pipeline keeps of each micro-batch on its way, without the stage's input.
    is_first, is_last
        Whether it has the embedding, the head.
    live
        Elements that are there at once while the stage is differentiated.
    passed
        Elements handed to or taken from the neighbours, gradients included.
    """

    num_layers: int
    tensors: Tuple[int, ...]
    forward_flops: int
    recompute_flops: int
    backward_flops: int
    kept: int
    is_first: bool
    is_last: bool
    live: int
    passed: int

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(self.tensors)

    @property
    def flops(self) -> int:
        """Operations of a micro-batch of one image, forward and backward."""
        return self.forward_flops + self.recompute_flops + self.backward_flops


def stage_cost(
    shape: ModelShape,
    *,
    num_layers: int,
    is_first: bool,
    is_last: bool,
    kept: Sequence[int] = (),
    recomputes: bool = True,
) -> StageCost:
    """Count what a stage costs.

    Parameters
    ----------
    shape
        The model's.
    num_layers
        Encoder layers on the stage.
    is_first, is_last
        Whether it has the embedding, the head.
    kept
        Which of its layers, counted from its first, have their output kept.
    recomputes
        Whether all but the kept outputs and the stage's input is computed again for the backward
        pass. On the last stage PopART does so only up to the last output that is kept
        (pipeline.cpp, setFinalFwdStageRecomputation).
    """
    tensors = [*(shape.embedding_tensors() if is_first else [])]
    tensors += shape.layer_tensors() * num_layers
    tensors += shape.head_tensors() if is_last else []
    layers = num_layers * shape.layer_flops()
    embedding = shape.embedding_flops() if is_first else 0
    head = shape.head_flops() if is_last else 0
    again = (max(kept) + 1 if kept else 0) if is_last else num_layers
    embedding_again = embedding if not is_last or again else 0
    hidden = shape.hidden_elements
    span = _longest_span(num_layers, kept) if recomputes else num_layers
    # An output that only the next stage reads is not kept here.
    outputs = [layer for layer in kept if is_last or layer != num_layers - 1]
    pixels = shape.num_channels * shape.image_size**2
    borders = (not is_first) + (not is_last)
    return StageCost(
        num_layers=num_layers,
        tensors=tuple(tensors),
        forward_flops=embedding + layers + head,
        recompute_flops=again * shape.layer_flops() + embedding_again if recomputes else 0,
        # Gradients of weights and of inputs; the images need none.
        backward_flops=embedding + 2 * (layers + head),
        kept=len(outputs) * hidden,
        is_first=is_first,
        is_last=is_last,
        live=span * shape.layer_activations()
        + (shape.layer_gradients() if num_layers else hidden)
        + (pixels + hidden if is_first else 0),
        passed=2 * borders * hidden,
    )


def _longest_span(num_layers: int, kept: Sequence[int]) -> int:
    """Return how many layers at most lie between two outputs that are kept."""
    borders = [-1, *sorted(kept), num_layers - 1]
    return max(end - start for start, end in zip(borders, borders[1:]))


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
        Images of a micro-batch.
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
    images: int,
) -> float:
    """Return the working data of the largest product, and the weights cast for one layer.

    A product of m x k by k x n, spread over T tiles so that least is moved, takes 3 (mkn)^(2/3)
    T^(1/3) elements: its two factors and its partial sums (Irony, Toledo, Tiskin 2004). PopLibs may
    take more, up to the memory proportion, to be faster.
    """
    most = DEFAULT_PROPORTION.value
    if formats.proportion is not None:
        most = formats.proportion[stage]
    product = images * (
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
