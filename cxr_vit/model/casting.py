"""fp32 weights with fp16 arithmetic, said in the graph: layers that cast weights to their input.

PopTorch has no autocast. Its compiler casts the weights of convolutions and norms to the input's
dtype, but not those of linear layers, and torch's own type inference, which PopTorch asks first,
widens a linear layer's output to fp32 and refuses a convolution of mixed dtypes. So nothing is left
to it: every layer casts for itself, and gradients flow back through the cast to the fp32 weights.
"""

from __future__ import annotations

from typing import Dict, Optional, Type

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["cast_weights_to_input"]


def _like(value: Tensor, weight: Optional[Tensor]) -> Optional[Tensor]:
    return None if weight is None else weight.to(value.dtype)


class CastingLinear(nn.Linear):
    """A linear layer in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return F.linear(input, self.weight.to(input.dtype), _like(input, self.bias))


class CastingConv2d(nn.Conv2d):
    """A convolution in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[B, in, H, W]`` to ``[B, out, h, w]``."""
        return self._conv_forward(input, self.weight.to(input.dtype), _like(input, self.bias))


class CastingLayerNorm(nn.LayerNorm):
    """A layer norm in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[..., width]``."""
        weight, bias = _like(input, self.weight), _like(input, self.bias)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


_CASTING: Dict[Type[nn.Module], Type[nn.Module]] = {
    nn.Linear: CastingLinear,
    nn.Conv2d: CastingConv2d,
    nn.LayerNorm: CastingLayerNorm,
}


def cast_weights_to_input(model: nn.Module) -> None:
    """Let every layer of `model` cast its weights to the dtype of its input.

    Parameters and their names stay what they are.
    """
    for module in model.modules():
        module.__class__ = _CASTING.get(type(module), type(module))
