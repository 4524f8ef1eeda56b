"""Record the attention probabilities of a forward pass, of any model and library version."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: What eager attention computes its probabilities with.
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class RecordAttention(TorchFunctionMode):
    """Within it, attention keeps its probabilities, in the graph of the gradients.

    Fused attention never has them, so `scaled_dot_product_attention` is computed in steps. Neither
    the modules of the model nor the version of transformers matter.

    Attributes
    ----------
    probabilities
        One for each layer, in order: float ``[B, heads, queries, keys]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: List[Tensor] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Tuple[Any, ...] = (),
        kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        output = function(*args, **kwargs)
        if function in _SOFTMAX and output.dim() == 4:
            return self._record(output)
        return output

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor] = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Optional[float] = None,
        **others: Any,
    ) -> Tensor:
        assert attn_mask is None and not is_causal and dropout_p == 0.0, "a ViT in evaluation"
        factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = query @ key.transpose(-2, -1) * factor
        return self._record(scores.softmax(dim=-1)) @ value

    def _record(self, probabilities: Tensor) -> Tensor:
        if not probabilities.requires_grad:  # the model is frozen
            probabilities.requires_grad_()
        self.probabilities.append(probabilities)
        return probabilities
