"""Multi-label loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def multi_label_loss(logits: Tensor, labels: Tensor, *, has_unknown: bool = False) -> Tensor:
    """Compute the mean binary cross-entropy over samples and labels, ``[B, C]``, in fp32.

    With `has_unknown`, labels of `UNKNOWN` count as a loss of 0. The divisor is B x C all the same:
    it is constant, so the mean over equal micro-batches is the mean over the batch.
    """
    if has_unknown:
        known = (labels >= 0).float()
        return F.binary_cross_entropy_with_logits(logits.float(), labels * known, weight=known)
    return F.binary_cross_entropy_with_logits(logits.float(), labels)
