"""Multi-label loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["multi_label_loss"]


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean binary cross-entropy over samples and labels, in fp32.

    The divisor is constant, so the mean over equal micro-batches is the mean over the batch.

    Parameters
    ----------
    logits
        ``[B, C]``, any float dtype.
    labels
        float32 ``[B, C]``, 0 or 1.

    Returns
    -------
    Tensor
        float32 scalar.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels)
