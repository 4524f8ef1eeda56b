"""Multi-label loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean binary cross-entropy over samples and labels, ``[B, C]``, in fp32.

    The divisor is constant, so the mean over equal micro-batches is the mean over the batch.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels)
