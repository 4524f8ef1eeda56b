"""What the parts of a ViT cost: parameters, operations and bytes, from its shape alone.

Counted exactly: parameters, matrix products, and what a pipeline keeps of a stage. Estimated: what
is live while a layer is differentiated. Imports no torch.
"""

from __future__ import annotations

from typing import List, NamedTuple, Sequence, Tuple

from cxr_vit.config.architectures import known_architecture
from cxr_vit.config.schema import Config
from cxr_vit.data.labels import label_names
from cxr_vit.errors import ConfigError

__all__ = ["ModelShape", "StageCost", "stage_cost"]

#: Operations of a multiplication and an addition.
_MULTIPLY_ADD = 2


class ModelShape(NamedTuple):
    """The sizes of a ViT and of the films it takes.

    `image_bytes` is what a film takes as it crosses to the device.
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
        """Elements of the hidden states of one film."""
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
        """Operations of the embedding's matrix products on one film, forward."""
        pixels = self.num_channels * self.patch_size**2
        return _MULTIPLY_ADD * (self.tokens - 1) * pixels * self.hidden_size

    def layer_flops(self) -> int:
        """Operations of an encoder layer's matrix products on one film, forward."""
        tokens, width = self.tokens, self.hidden_size
        projections = 4 * tokens * width * width
        attention = 2 * tokens * tokens * width
        return _MULTIPLY_ADD * (projections + attention + 2 * tokens * width * self.mlp_size)

    def head_flops(self) -> int:
        """Operations of the classifier's matrix product on one film, forward."""
        return _MULTIPLY_ADD * self.hidden_size * self.num_labels

    def layer_activations(self) -> int:
        """Elements that the backward pass of an encoder layer needs of one film, plain attention.

        With s tokens, width h, MLP m and a heads: input and output of both layer norms, query, key,
        value, context (8 sh), both sides of the activation (2 sm) and the attention's probabilities
        (a s^2). What torch saves for it is the same number (tests/planner/test_costs.py).
        """
        attention = self.num_heads * self.tokens**2
        return 8 * self.hidden_elements + 2 * self.tokens * self.mlp_size + attention

    def layer_gradients(self) -> int:
        """Elements of one film's gradients at the peak of a layer's backward pass.

        Those of the residual stream and of the MLP's hidden layer, while all activations are there.
        """
        return self.hidden_elements + self.tokens * self.mlp_size

    def largest_product(self) -> int:
        """Multiplications of a layer's largest matrix product on one film."""
        return self.tokens * self.hidden_size * max(self.mlp_size, self.hidden_size)


class StageCost(NamedTuple):
    """What one stage costs; all but the parameters for one film.

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
        """Operations of a micro-batch of one film, forward and backward."""
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
        # Gradients of weights and of inputs; the films need none.
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
