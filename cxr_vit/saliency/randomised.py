"""A model whose weights are randomised step by step, to check that its maps depend on them."""

from __future__ import annotations

import copy
from typing import Dict, Iterator, List, Tuple

import torch
from torch import nn

from cxr_vit.model.stages import StagedViT


def cascade(model: StagedViT, seed: int = 0) -> Iterator[Tuple[str, StagedViT]]:
    """Yield a copy of the model with more and more parts randomised, and what was last.

    Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018, section 3.1: from the head with
    the last norm over the layers, the last first, to the embedding. The entries of each parameter
    are permuted, so that only their order is lost and activations keep their scale. It is the same
    copy each time.
    """
    randomised = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameters in _parts(randomised).items():
        with torch.no_grad():
            for parameter in parameters:
                order = torch.randperm(parameter.numel(), generator=generator)
                permuted = parameter.flatten()[order.to(parameter.device)]
                parameter.copy_(permuted.reshape(parameter.shape))
        yield name, randomised


def _parts(model: StagedViT) -> Dict[str, List[nn.Parameter]]:
    """Return the parameters of each part, from the last part to the first."""
    numbers = {
        parameter: number
        for number, layer in enumerate(model.layers)
        for parameter in layer.parameters()
    }
    before: List[nn.Parameter] = []
    after: List[nn.Parameter] = []
    of_layers: Dict[str, List[nn.Parameter]] = {}
    for _, parameter in model.hub_parameters():  # in the order of the forward pass
        if parameter in numbers:
            of_layers.setdefault(f"layer {numbers[parameter]}", []).append(parameter)
        else:
            (after if of_layers else before).append(parameter)
    layers = dict(reversed(list(of_layers.items())))
    return {"head": after, **layers, "embedding": before}
