"""StagePlan: which layers sit on which stage. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Sequence, Tuple, Union

__all__ = ["StagePlan"]


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
