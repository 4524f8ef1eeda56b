"""Values derived from the configuration: the batch arithmetic and the cut into stages.

===================== ==========================================================================
micro_batch_size      samples in one forward pass of one replica
gradient_accumulation micro-batches per weight update, per replica
replicas              data-parallel copies of the whole pipeline
global batch          samples per weight update: micro_batch_size x gradient_accumulation x replicas
device_iterations     weight updates per host call in training
host batch            samples per host call, what the loader yields: global batch x
                      device_iterations (PopTorch calls it the combined batch)
step                  one weight update; counters, schedules and all `*_steps` keys count steps
===================== ==========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

from cxr_vit.config.schema import BatchSection
from cxr_vit.errors import Problem


@dataclass(frozen=True)
class BatchPlan:
    """Samples per forward pass, per weight update and per host call."""

    micro_batch_size: int
    gradient_accumulation: int
    replicas: int
    device_iterations: int
    eval_micro_batch_size: int
    eval_device_iterations: int
    eval_replicas: int

    @classmethod
    def from_section(cls, batch: BatchSection) -> BatchPlan:
        """Make the plan; derive the accumulation if the global batch is given instead."""
        accumulation = batch.gradient_accumulation
        if accumulation is None:
            assert batch.global_batch_size is not None
            accumulation = batch.global_batch_size // (batch.micro_batch_size * batch.replicas)
        sizes = batch.model_dump(exclude={"global_batch_size"})
        sizes["gradient_accumulation"] = accumulation
        sizes["eval_replicas"] = batch.eval_replicas or batch.replicas
        return cls(**sizes)

    @property
    def global_batch_size(self) -> int:
        """Samples per weight update."""
        return self.micro_batch_size * self.gradient_accumulation * self.replicas

    @property
    def host_batch_size(self) -> int:
        """Samples per host call in training."""
        return self.global_batch_size * self.device_iterations

    @property
    def eval_host_batch_size(self) -> int:
        """Samples per host call in evaluation."""
        return self.eval_micro_batch_size * self.eval_replicas * self.eval_device_iterations

    def describe(self) -> List[str]:
        """Return the arithmetic with its numbers, as lines of text."""
        return [
            f"global batch    {self.global_batch_size} samples per weight update"
            f" = {self.micro_batch_size} micro-batch x {self.gradient_accumulation} accumulation"
            f" x {self.replicas} replicas",
            f"host batch      {self.host_batch_size} samples per host call"
            f" = {self.global_batch_size} global batch"
            f" x {self.device_iterations} device iterations",
            f"evaluation      {self.eval_host_batch_size} samples per host call"
            f" = {self.eval_micro_batch_size} micro-batch x {self.eval_replicas} replicas"
            f" x {self.eval_device_iterations} device iterations",
        ]


def given_accumulation(section: BatchSection, accumulation: int) -> str:
    """Name the accumulation by the key that the user gave, for `Problem.given`."""
    if section.global_batch_size is None:
        return f"batch.gradient_accumulation={accumulation}"
    return (
        f"batch.global_batch_size={section.global_batch_size}, an accumulation of {accumulation},"
    )


class Kept(NamedTuple):
    """Layers of a stage, counted over the whole model, with outputs kept for the backward pass.

    `attentions` are those of which also the output of the attention is kept.
    """

    layers: List[int]
    attentions: List[int]


@dataclass(frozen=True)
class StagePlan:
    """The cut of a ViT into consecutive stages.

    The embedding is on the first stage. The head (final layer norm, classifier and loss) is on the
    last stage. A stage may have 0 encoder layers.
    """

    layers_per_stage: Tuple[int, ...]

    @classmethod
    def from_list(cls, layers_per_stage: Sequence[int]) -> StagePlan:
        """Make the plan from the list in the configuration."""
        return cls(tuple(layers_per_stage))

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.layers_per_stage)

    @property
    def empty_stage(self) -> Optional[int]:
        """First stage without work: 0 layers and neither the embedding nor the head."""
        inner = self.layers_per_stage[1:-1]
        return inner.index(0) + 1 if 0 in inner else None

    def layers(self, stage: int) -> range:
        """Return the indices of the encoder layers on `stage`, counted over the whole model."""
        start = sum(self.layers_per_stage[:stage])
        return range(start, start + self.layers_per_stage[stage])

    def has_embedding(self, stage: int) -> bool:
        """Whether the input of `stage` is the images."""
        return stage == 0

    def has_head(self, stage: int) -> bool:
        """Whether the output of `stage` is the logits."""
        return stage == self.num_stages - 1

    def kept_outputs(
        self, recompute: Union[str, Sequence[Union[str, Sequence[int]]], None], *, on_ipus: bool
    ) -> Optional[List[Kept]]:
        """Return what each stage keeps for the backward pass, by `pipeline.recompute`.

        None if nothing is recomputed.
        """
        if recompute is None:
            recompute = "every_layer" if on_ipus else "none"
        if recompute == "none":
            return None
        choices = [recompute] * self.num_stages if isinstance(recompute, str) else recompute
        return [self._kept(stage, choice) for stage, choice in enumerate(choices)]

    def _kept(self, stage: int, choice: Union[str, Sequence[int]]) -> Kept:
        if not isinstance(choice, str):
            return Kept(list(choice), [])
        every = list(self.layers(stage))
        layers = every if choice in ("every_layer", "attention_mlp") else []
        return Kept(layers, every if choice == "attention_mlp" else [])

    def allocation(self) -> List[Tuple[str, int]]:
        """Return the parts of the model in order, each with its stage."""
        parts = [("Embedding", 0)]
        for stage in range(self.num_stages):
            parts += [(f"Encoder {layer}", stage) for layer in self.layers(stage)]
        return [*parts, ("Head", self.num_stages - 1)]

    def describe(self, place: str = "stage") -> List[str]:
        """Return one line of text per part; `place` names what a stage runs on."""
        return [f"{part:<12} --> {place} {stage}" for part, stage in self.allocation()]


#: In a list of layers per stage: the layers that are left.
REST = -1


def fill_rest(layers_per_stage: Sequence[int], depth: int) -> List[int]:
    """Replace each -1 by its share of the layers that are left, the last with the remainder.

    So does optimum-graphcore (modeling_utils.py, _expand_layers_per_ipu_wildcard). The result may
    not add up to `depth` if too few layers are left.
    """
    filled = list(layers_per_stage)
    stages = [stage for stage, layers in enumerate(filled) if layers == REST]
    if not stages:
        return filled
    left = max(0, depth - sum(layers for layers in filled if layers != REST))
    for stage in stages:
        filled[stage] = left // len(stages)
    filled[stages[-1]] += left % len(stages)
    return filled


def empty_stage_problem(
    layers_per_stage: Sequence[int], *, key: str = "layers_per_stage", place: str = "stage"
) -> Optional[Problem]:
    """Return the problem of a stage without work, or None; `place` is what a stage runs on."""
    empty = StagePlan.from_list(layers_per_stage).empty_stage
    if empty is None:
        return None
    return Problem(
        f"pipeline.{key}={list(layers_per_stage)}",
        f"leaves {place} {empty} without work.",
        "Only the first stage (embedding) and the last (head) may have 0 layers.",
    )
