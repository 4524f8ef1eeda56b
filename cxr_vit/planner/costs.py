"""Costs of the parts of a ViT: parameters, operations and bytes, from its shape alone.

Parameters, matrix products and what a pipeline keeps of a stage are counted exactly. The memory
that a layer's backward pass needs besides is estimated.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.architectures import KINDS, POOLINGS, Kind, known_architecture
from cxr_vit.config.ipu_rules import eval_layers, eval_proportion
from cxr_vit.data.label_names import label_names
from cxr_vit.errors import ConfigError
from cxr_vit.planner.hardware import ESTIMATES, MEMORY_UNCERTAINTY, Ipu, Target

#: Operations of a multiplication and an addition.
_MULTIPLY_ADD = 2


class ModelShape(NamedTuple):
    """Sizes of a model and of its images; `image_bytes` cross to the device per image.

    Operations, activations and products below are those of one image.
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
    kind: Kind = KINDS["vit"]
    qkv_bias: bool = True

    @classmethod
    def from_config(cls, config: Config) -> ModelShape:
        """Read the shape from a configuration; ConfigError if `model.name` does not imply it."""
        found = known_architecture(config.model.name)
        if found is None and Path(config.model.name).exists():
            raise ConfigError(
                f"model.name={config.model.name} has no config.json with the shape of the model: it"
                " is known after loading, and nothing is loaded to plan. Give the size (vit-base,"
                " ...) or the hub name of the same shape."
            )
        if found is None:
            raise ConfigError(
                f"model.name={config.model.name} does not imply its size, and nothing is loaded to"
                " plan. Give a size (vit-base, ...), a hub name such as"
                " google/vit-base-patch16-224-in21k, or a folder with its config.json."
            )
        size, kind = config.data.image_size, KINDS[found.kind]
        pooling = config.model.pooling or found.pooling or kind.pooling
        return cls(
            hidden_size=found.hidden_size,
            num_layers=found.num_layers,
            num_heads=found.num_heads,
            mlp_size=found.mlp_size,
            patch_size=found.patch_size or config.model.patch_size,
            num_channels=found.num_channels,
            image_size=size,
            num_labels=len(label_names(config.data)),
            image_bytes=size * size,  # one gray byte per pixel
            kind=kind._replace(pooling=pooling),
            qkv_bias=found.qkv_bias,
        )

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Patches and the tokens of the model."""
        return self.patches + self.kind.extra_tokens

    @property
    def hidden_elements(self) -> int:
        """Elements of the hidden states."""
        return self.tokens * self.hidden_size

    def embedding_tensors(self) -> List[int]:
        """Return the elements of each parameter of the embedding."""
        pixels = self.num_channels * self.patch_size**2
        width = self.hidden_size
        tokens = [width] * self.kind.extra_tokens
        return [width * pixels, width, *tokens, self.hidden_elements]

    def layer_tensors(self) -> List[int]:
        """Return the elements of each parameter of an encoder layer."""
        width, mlp = self.hidden_size, self.mlp_size
        attention = [width * width] * 4 + [width] * (4 if self.qkv_bias else 1)
        vectors = 6 if self.kind.layer_scale else 4  # norms and scales
        return [*attention, width * mlp, mlp, mlp * width, width, *[width] * vectors]

    def head_tensors(self) -> List[int]:
        """Return the elements of each parameter of the last layer norm and the classifier."""
        width = self.hidden_size
        return [width, width, self.head_size * self.num_labels, self.num_labels]

    @property
    def head_size(self) -> int:
        """Numbers that the classifier takes."""
        return POOLINGS[self.kind.pooling] * self.hidden_size

    def embedding_flops(self) -> int:
        """Return the operations of the embedding, forward."""
        pixels = self.num_channels * self.patch_size**2
        return _MULTIPLY_ADD * self.patches * pixels * self.hidden_size

    def layer_flops(self) -> int:
        """Return the operations of an encoder layer, forward."""
        tokens, width = self.tokens, self.hidden_size
        return _MULTIPLY_ADD * 2 * tokens * width * (2 * width + tokens + self.mlp_size)

    def attention_activations(self) -> int:
        """Return the elements that the backward pass of a layer's attention needs, plain attention.

        With s tokens, width h and a heads: input and output of the layer norm, query, key, value,
        context (6 sh) and the probabilities (a s^2). With LayerScale also its input (sh).
        """
        hidden = 6 + self.kind.layer_scale
        return hidden * self.hidden_elements + self.probabilities()

    def probabilities(self) -> int:
        """Elements of the attention probabilities of a layer, per image."""
        return self.num_heads * self.tokens**2

    def mlp_activations(self) -> int:
        """Return the elements that the backward pass of a layer's MLP needs.

        With an MLP of m: input and output of the layer norm (2 sh), both sides of the activation
        (2 sm). With LayerScale also its input (sh).
        """
        hidden = 2 + self.kind.layer_scale
        return hidden * self.hidden_elements + 2 * self.tokens * self.mlp_size

    def layer_activations(self) -> int:
        """Return the elements that the backward pass of an encoder layer needs.

        torch saves as many (tests/planner/test_costs.py).
        """
        return self.attention_activations() + self.mlp_activations()

    def forward_activations(self) -> int:
        """Return the elements that exist at once in the forward pass of an encoder layer.

        The residual stream, query, key, value and both sides of the softmax (4 sh + 2 a s^2), or
        the residual stream and both sides of the MLP's activation (sh + 2 sm).
        """
        scores = self.num_heads * self.tokens**2
        mlp = self.hidden_elements + 2 * self.tokens * self.mlp_size
        return max(4 * self.hidden_elements + 2 * scores, mlp)

    def product_weights(self) -> int:
        """Return the elements of the weights of a layer's products."""
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.mlp_size

    def layer_gradients(self) -> int:
        """Return the elements of a layer's gradients at the peak: residual stream, MLP's inside."""
        return self.hidden_elements + self.tokens * self.mlp_size


class StageCost(NamedTuple):
    """Costs of one stage; all but parameters and weights are per image.

    `tensors` are the elements of each parameter. A pipeline keeps `kept` elements of each
    micro-batch in flight, without the stage's input, and `kept_weights` whatever its size. At most
    `live` elements exist at once while the stage is differentiated. `passed` elements are sent to
    or received from the neighbours, gradients included. The first stage has the embedding, the last
    the head.
    """

    num_layers: int
    tensors: Tuple[int, ...]
    forward_flops: int
    recompute_flops: int
    backward_flops: int
    kept: int
    kept_weights: int
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
        """Operations forward and backward."""
        return self.forward_flops + self.recompute_flops + self.backward_flops


def stage_cost(
    shape: ModelShape,
    *,
    num_layers: int,
    is_first: bool,
    is_last: bool,
    kept: Sequence[int] = (),
    attentions: Sequence[int] = (),
    recomputes: bool = True,
    stashes: bool = False,
    on_ipu: bool = True,
) -> StageCost:
    """Count the costs of a stage; off IPUs attention is fused, without probabilities.

    `kept` are the layers, counted from the stage's first, whose output is kept, `attentions` those
    whose attention's is, too. With `recomputes` all but these and the stage's input is computed
    again. On the last stage PopART does so only up to the last kept output (pipeline.cpp,
    setFinalFwdStageRecomputation). Without, a stage that `stashes`, as micro-batches overlap, keeps
    what its backward pass reads and the cast or transposed weights of its products, which PopART
    takes for activations (pipeline.cpp, getStashCandidateTensors), but for the last stage.
    """
    tensors = shape.embedding_tensors() * is_first + shape.layer_tensors() * num_layers
    tensors += shape.head_tensors() * is_last
    layers = num_layers * shape.layer_flops()
    embedding = shape.embedding_flops() if is_first else 0
    head = _MULTIPLY_ADD * shape.head_size * shape.num_labels if is_last else 0
    hidden = shape.hidden_elements
    # What backward needs of the embedding's products.
    pixels = shape.num_channels * shape.image_size**2 if is_first else 0
    parts = _parts(shape, num_layers, kept, attentions, is_fused=not on_ipu)
    recomputed = elements = weights = 0
    if recomputes:
        again = num_layers if not (is_last and on_ipu) else max(kept, default=-1) + 1
        recomputed = again * shape.layer_flops() + (embedding if again or not is_last else 0)
        # An output that only the next stage reads is not kept here.
        outputs = [layer for layer in kept if is_last or layer != num_layers - 1]
        elements = (len(outputs) + len(attentions)) * hidden
    elif stashes and not is_last:
        elements = sum(parts) + pixels
        elements -= 0 if is_first or not num_layers else hidden  # the input is kept anyway
        weights = num_layers * shape.product_weights()
    live = max(parts) if recomputes else sum(parts)
    live += shape.layer_gradients() if num_layers else hidden
    if is_first:
        live += pixels + hidden
    return StageCost(
        num_layers=num_layers,
        tensors=tuple(tensors),
        forward_flops=embedding + layers + head,
        recompute_flops=recomputed,
        # Gradients of weights and of inputs; the images need none.
        backward_flops=embedding + 2 * (layers + head),
        kept=elements,
        kept_weights=weights,
        is_first=is_first,
        is_last=is_last,
        live=live,
        passed=2 * [is_first, is_last].count(False) * hidden,
    )


def _parts(
    shape: ModelShape,
    num_layers: int,
    kept: Sequence[int],
    attentions: Sequence[int],
    *,
    is_fused: bool,
) -> List[int]:
    """Return the activations of a stage between two kept outputs, elements."""
    parts = [0]
    for layer in range(num_layers):
        parts[-1] += shape.attention_activations() - is_fused * shape.probabilities()
        if layer in attentions:
            parts.append(0)
        parts[-1] += shape.mlp_activations()
        if layer in kept:
            parts.append(0)
    return parts


def inference_cost(
    shape: ModelShape, *, num_layers: int, is_first: bool, is_last: bool
) -> StageCost:
    """Count the costs of a stage that is not differentiated: only one layer's tensors are live."""
    cost = stage_cost(
        shape, num_layers=num_layers, is_first=is_first, is_last=is_last, recomputes=False
    )
    live = shape.forward_activations() if num_layers else shape.hidden_elements
    if is_first:
        live = max(live, shape.num_channels * shape.image_size**2 + shape.hidden_elements)
    return cost._replace(backward_flops=0, live=live, passed=cost.passed // 2)


_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

#: PopART shards only tensors with this many elements or more (sessionoptions.hpp,
#: minElementsForReplicatedTensorSharding).
_LEAST_SHARDED = 8192

#: Bytes that torch saves per activation under autocast: some in fp32, some in 16 bits (measured
#: with saved_tensors_hooks; tests/planner/test_costs.py).
_AUTOCAST_BYTES = 2.5

#: Category of `StageMemory` -> its name in reports, in their order.
CATEGORIES = {
    "weights": "weights",
    "accumulators": "gradient accumulators",
    "optimizer": "optimizer state",
    "stash": "activation stash",
    "live": "live in backward",
    "temporaries": "matmul temporaries",
    "io": "input and output",
    "code": "code",
    "imbalance": "tile imbalance",
}


class Formats(NamedTuple):
    """Bytes per element of each kind, and where the optimizer state is.

    `shards` replicas share the optimizer state: those of one process (PopTorch, Compiler.cpp:740).
    `accumulates` if gradients are added up over several micro-batches; `combined` if SGD's velocity
    is their sum. `proportion` of each stage's memory may be a product's working data; None for
    PopLibs' own. `result` is that of the labels, or in evaluation of the logits.
    """

    activation: float
    weight: int
    partial: int
    accumulator: int
    moments: int
    on_chip: bool
    shards: int
    accumulates: bool
    combined: bool
    proportion: Optional[Tuple[float, ...]]
    result: int = 4
    is_training: bool = True

    @classmethod
    def from_config(
        cls, config: Config, target: Target, batch: BatchPlan, local_replicas: Optional[int] = None
    ) -> Formats:
        """Read the formats from a configuration; one process has all replicas by default."""
        optim, engine, stages = config.optim, config.engine, len(config.pipeline.layers_per_stage)
        has_momentum = optim.name != "sgd" or optim.momentum > 0
        if target.ipu is None:
            moments = 4 * has_momentum + 4 * (optim.name != "sgd")
            activation = 4.0 if target.is_fp32 else _AUTOCAST_BYTES
            return cls(activation, 4, 4, 4, moments, True, 1, True, False, None)
        moments = _BYTES[optim.first_moment] if has_momentum else 0
        if optim.name != "sgd":
            moments += _BYTES[optim.second_moment]
        return cls(
            activation=_BYTES[target.precision],
            weight=_BYTES[engine.weights],
            partial=_BYTES["fp32" if target.is_fp32 else engine.partials],
            accumulator=_BYTES[optim.accumulator],
            moments=moments,
            on_chip=engine.optimizer_state_on_chip,
            shards=(local_replicas or batch.replicas) if engine.replicated_tensor_sharding else 1,
            accumulates=batch.gradient_accumulation > 1,
            combined=optim.use_combined_accum,
            proportion=_proportions(config.pipeline.available_memory_proportion, stages),
        )

    def in_evaluation(self, config: Config) -> Formats:
        """Return the formats of the inference graph of an IPU: weights, no state of training."""
        return self._replace(
            moments=0,
            accumulates=False,
            combined=False,
            proportion=_proportions(eval_proportion(config), len(eval_layers(config))),
            result=_BYTES[config.engine.eval_output],
            is_training=False,
        )


def _proportions(
    given: Union[float, List[float], None], stages: int
) -> Optional[Tuple[float, ...]]:
    """Return the proportion of each stage; a list that is too short is refused elsewhere."""
    if given is None:
        return None
    each = given if isinstance(given, list) else [given]
    return tuple((each + each[-1:] * stages)[:stages])


class StageMemory(NamedTuple):
    """Bytes of a stage on its device by category; `limit` is infinite if that is unknown."""

    weights: float
    accumulators: float
    optimizer: float
    stash: float
    live: float
    io: float
    temporaries: float = 0.0
    code: float = 0.0
    imbalance: float = 0.0
    limit: float = math.inf

    @property
    def total(self) -> float:
        """Bytes that the device must have; on an IPU the fullest tile times their number."""
        total: float = sum(getattr(self, category) for category in CATEGORIES)
        return total

    @property
    def share(self) -> float:
        """The total over the limit."""
        return self.total / self.limit

    @property
    def headroom(self) -> float:
        """Bytes left; negative if the stage does not fit."""
        return self.limit - self.total

    @property
    def fits(self) -> bool:
        """Whether the stage is predicted to fit, even if closely."""
        return self.share <= 1

    @property
    def verdict(self) -> str:
        """Whether it fits, given the error of the prediction."""
        if math.isinf(self.limit):
            return "unknown"
        if self.share * (1 + MEMORY_UNCERTAINTY) <= 1:
            return "fits"
        if self.fits:
            return "fits, closely"
        return "may not fit" if self.share * (1 - MEMORY_UNCERTAINTY) <= 1 else "does not fit"


def stage_memory(
    cost: StageCost,
    shape: ModelShape,
    formats: Formats,
    target: Target,
    stage: int,
    depth: int,
    micro_batch_size: int,
) -> StageMemory:
    """Predict the memory of a stage that holds at most `depth` micro-batches at once."""
    size = formats.activation
    own_input: float = shape.image_bytes if cost.is_first else shape.hidden_elements * size
    images = shape.image_bytes if cost.is_first else 0
    results = formats.result * shape.num_labels if cost.is_last else 0
    memory = StageMemory(
        weights=formats.weight * cost.parameters,
        accumulators=formats.accumulator * cost.parameters
        if formats.accumulates and not formats.combined
        else 0,
        optimizer=_optimizer_bytes(cost, formats),
        stash=depth
        * (micro_batch_size * (own_input + cost.kept * size) + cost.kept_weights * size),
        live=micro_batch_size * cost.live * size,
        io=micro_batch_size * (images + results + cost.passed * size),
        limit=math.inf if target.memory_bytes is None else target.memory_bytes,
    )
    if target.ipu is None:
        # Attention is fused: its probabilities are not kept.
        kept = (
            own_input + cost.num_layers * (shape.layer_activations() - shape.probabilities()) * size
        )
        live = shape.layer_gradients()
        if cost.recompute_flops:  # hidden states are fp32, also under autocast
            kept, live = own_input + 4 * cost.kept, cost.live
        return memory._replace(
            stash=depth * micro_batch_size * kept,
            live=micro_batch_size * live * size,
            temporaries=2.0 * cost.parameters if size < formats.weight else 0.0,  # cast weights
        )
    temporaries = _temporary_bytes(cost, shape, formats, target.ipu, stage, micro_batch_size)
    code = ESTIMATES["code_bytes" if formats.is_training else "eval_code_bytes"].value
    memory = memory._replace(temporaries=temporaries, code=code)
    return memory._replace(imbalance=(ESTIMATES["imbalance"].value - 1) * memory.total)


def _optimizer_bytes(cost: StageCost, formats: Formats) -> float:
    """Return the bytes of the moments; off the chip only those of the tensor being updated."""
    if not formats.on_chip:
        return formats.moments * max(cost.tensors)
    sharded = sum(size for size in cost.tensors if size >= _LEAST_SHARDED)
    whole = cost.parameters - sharded
    return formats.moments * (whole + sharded / formats.shards)


def _temporary_bytes(
    cost: StageCost, shape: ModelShape, formats: Formats, ipu: Ipu, stage: int, images: int
) -> float:
    """Return the working data of the largest product, and the weights cast for one layer.

    A product of m x k by k x n, spread over T tiles with the least data movement, takes
    3 (mkn)^(2/3) T^(1/3) elements: its two factors and its partial sums (Irony, Toledo, Tiskin
    2004). PopLibs may take more, up to the memory proportion, to be faster.
    """
    given = formats.proportion
    most = ESTIMATES["default_proportion"].value if given is None else given[stage]
    product = shape.hidden_elements * max(shape.mlp_size, shape.hidden_size)
    if not cost.num_layers:  # the embedding or the head alone
        product = cost.forward_flops // _MULTIPLY_ADD
    elements: float = (images * product) ** (2 / 3) * ipu.tiles.value ** (1 / 3)
    least = (2 * formats.activation + formats.partial) * elements
    is_cast = formats.activation < formats.weight and cost.num_layers
    cast = formats.activation * sum(shape.layer_tensors()) if is_cast else 0.0
    return min(most * ipu.memory_bytes, least) + cast
