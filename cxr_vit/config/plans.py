"""The batch arithmetic, said once (design.md section 3). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple, Union

from cxr_vit.config.schema import BatchSection

__all__ = ["BatchPlan", "StagePlan"]


@dataclass(frozen=True)
class BatchPlan:
    """How many samples a forward pass, a weight update and a host call take."""

    micro_batch_size: int
    gradient_accumulation: int
    replicas: int
    device_iterations: int
    eval_micro_batch_size: int
    eval_device_iterations: int

    @classmethod
    def from_section(cls, batch: BatchSection) -> BatchPlan:
        """Derive the accumulation from the global batch where that is given instead."""
        accumulation = batch.gradient_accumulation
        if accumulation is None:
            assert batch.global_batch_size is not None
            accumulation = batch.global_batch_size // (batch.micro_batch_size * batch.replicas)
        return cls(
            micro_batch_size=batch.micro_batch_size,
            gradient_accumulation=accumulation,
            replicas=batch.replicas,
            device_iterations=batch.device_iterations,
            eval_micro_batch_size=batch.eval_micro_batch_size,
            eval_device_iterations=batch.eval_device_iterations,
        )

    @property
    def global_batch_size(self) -> int:
        """Samples per weight update."""
        return self.micro_batch_size * self.gradient_accumulation * self.replicas

    @property
    def host_batch_size(self) -> int:
        """Samples per host call in training: what the loader yields."""
        return self.global_batch_size * self.device_iterations

    @property
    def eval_host_batch_size(self) -> int:
        """Samples per host call in evaluation."""
        return self.eval_micro_batch_size * self.replicas * self.eval_device_iterations

    def describe(self) -> List[str]:
        """Write the arithmetic out with its numbers."""
        return [
            f"global batch    {self.global_batch_size} samples per weight update"
            f" = {self.micro_batch_size} micro-batch x {self.gradient_accumulation} accumulation"
            f" x {self.replicas} replicas",
            f"host batch      {self.host_batch_size} samples per host call"
            f" = {self.global_batch_size} global batch"
            f" x {self.device_iterations} device iterations",
            f"evaluation      {self.eval_host_batch_size} samples per host call"
            f" = {self.eval_micro_batch_size} micro-batch x {self.replicas} replicas"
            f" x {self.eval_device_iterations} device iterations",
        ]


@dataclass(frozen=True)
class StagePlan:
    """The cut of a ViT into consecutive stages.

    The embedding opens the first stage, the head (final layer norm, classifier and loss) closes
    the last one.

    Parameters
    ----------
    layers_per_stage
        Number of encoder layers of each stage, first to last; 0 is allowed.
    """

    layers_per_stage: Tuple[int, ...]

    @classmethod
    def from_list(cls, layers_per_stage: Sequence[int]) -> StagePlan:
        """Make a plan of the configuration's list."""
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
        """Whether `stage` takes the pixels."""
        return stage == 0

    def has_head(self, stage: int) -> bool:
        """Whether `stage` gives the logits."""
        return stage == self.num_stages - 1

    def kept_layers(
        self, recompute: Union[str, Sequence[Union[str, Sequence[int]]]]
    ) -> List[List[int]]:
        """Return which layers of each stage have their output kept for the backward pass.

        Parameters
        ----------
        recompute
            `pipeline.recompute`: ``"every_layer"``, ``"stage_inputs"``, or an item a stage, one of
            these words or a list of layers, counted over the whole model.
        """
        choices = [recompute] * self.num_stages if isinstance(recompute, str) else recompute
        return [
            (list(self.layers(stage)) if choice == "every_layer" else [])
            if isinstance(choice, str)
            else [int(layer) for layer in choice]
            for stage, choice in enumerate(choices)
        ]

    def allocation(self) -> List[Tuple[str, int]]:
        """List the parts of the model in order, each with its stage."""
        parts = [("Embedding", 0)]
        for stage in range(self.num_stages):
            parts += [(f"Encoder {layer}", stage) for layer in self.layers(stage)]
        return [*parts, ("Head", self.num_stages - 1)]

    def describe(self, place: str = "stage") -> List[str]:
        """Write the device allocation, a line a part; `place` is what a stage runs on."""
        return [f"{part:<12} --> {place} {stage}" for part, stage in self.allocation()]
