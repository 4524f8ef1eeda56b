"""Maps of the patches of an image for the logit of a finding.

Both methods take a model in evaluation mode that is not compiled, in fp32 on one device, and return
float32 ``[B, len(columns), rows, columns of patches]`` on the CPU, 0 or more, in no unit: maps of
different images or findings are not comparable.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Sequence

import torch
from torch import Tensor

from cxr_vit.errors import ModelError
from cxr_vit.model.stages import StagedViT
from cxr_vit.saliency.attention import RecordAttention

#: Takes a model, images uint8 ``[B, 1, H, W]`` on its device, and columns of the logits.
Method = Callable[[StagedViT, Tensor, Sequence[int]], Tensor]


@torch.enable_grad()  # whatever the caller set
def relevance(model: StagedViT, images: Tensor, columns: Sequence[int]) -> Tensor:
    """Return the gradient-weighted relevance of attention.

    Chefer, Gur and Wolf, Generic Attention-model Explainability, ICCV 2021, equations 5 and 6: with
    the mean over heads of the positive part of gradient times attention, A, the relevance of the
    tokens is ``R = (1 + A_last) ... (1 + A_first)``. The map is the row of R that the head reads:
    that of the class token, the mean of those of the patches, or, where it reads both, the mean of
    the two. It leaves out what a patch adds by itself, which is the same for all.

    Raises ModelError if a layer computes no softmax of its own, which fused kernels other than
    torch's and other kinds of attention do not.
    """
    with RecordAttention() as record:
        logits = model(images)
    if len(record.probabilities) != len(model.layers):
        raise ModelError(
            f"{len(record.probabilities)} of {len(model.layers)} layers have attention whose"
            " probabilities can be recorded, and relevance needs all. Use grad_cam."
        )
    maps: List[Tensor] = []
    for column in columns:
        gradients = torch.autograd.grad(
            logits[:, column].sum(), record.probabilities, retain_graph=True
        )
        read = start = _row_of_head(model, len(images)).to(logits.device)
        for attention, gradient in zip(reversed(record.probabilities), reversed(gradients)):
            weighted = (attention * gradient).clamp(min=0).mean(dim=1).detach()
            # The last layer may compute the first tokens alone: the head reads no others.
            read = read + (read[:, None, : weighted.shape[1]] @ weighted)[:, 0]
        maps.append(_patches(model, read - start))
    return torch.stack(maps, dim=1)


def _row_of_head(model: StagedViT, count: int) -> Tensor:
    """Return how much the head reads each token of the last layer, ``[count, tokens]``."""
    pool, (tokens, _) = model.pool, model.hidden_shape
    row = torch.zeros(count, tokens)
    if pool.pooling in ("class", "both"):
        row[:, 0] = 1.0
    if pool.pooling in ("mean", "both"):
        row[:, pool.extra_tokens :] = 1.0 / (tokens - pool.extra_tokens)
    return row / row.sum(dim=1, keepdim=True)


@torch.enable_grad()  # whatever the caller set
def grad_cam(model: StagedViT, images: Tensor, columns: Sequence[int]) -> Tensor:
    """Return Grad-CAM on what goes into the last layer.

    Selvaraju et al., Grad-CAM, ICCV 2017: the positive part of the channels' sum, weighted by their
    gradients' mean over the patches. What comes out of the last layer has no gradient where the
    head reads the class token alone.
    """
    entering: List[Tensor] = []

    def keep(_layer: Any, given: Any) -> Any:
        hidden = given[0] if given[0].requires_grad else given[0].detach().requires_grad_()
        entering.append(hidden)
        return (hidden, *given[1:])

    hook = model.layers[-1].register_forward_pre_hook(keep)
    try:
        logits = model(images)
    finally:
        hook.remove()
    maps: List[Tensor] = []
    extra = model.pool.extra_tokens
    for column in columns:
        (gradient,) = torch.autograd.grad(logits[:, column].sum(), entering, retain_graph=True)
        weights = gradient[:, extra:].mean(dim=1, keepdim=True)
        maps.append(_patches(model, (entering[0] * weights).sum(dim=2).clamp(min=0).detach()))
    return torch.stack(maps, dim=1)


def _patches(model: StagedViT, tokens: Tensor) -> Tensor:
    """Return the values of the patches as a square: ``[B, tokens]`` to ``[B, side, side]``."""
    side = model.config.image_size // model.config.patch_size
    return tokens[:, model.pool.extra_tokens :].reshape(-1, side, side).float().cpu()


#: Name in the configuration and on command lines -> method.
METHODS: Dict[str, Method] = {"relevance": relevance, "grad_cam": grad_cam}
