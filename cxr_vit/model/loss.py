"""Multi-label losses."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["multi_label_loss"]


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of logits, the mean over samples and labels.

    Parameters
    ----------
    logits
        Any float dtype ``[B, C]``; computed in fp32.
    labels
        float32 ``[B, C]``, 0 or 1.

    Returns
    -------
    Tensor
        float32, a scalar. It divides by a constant, so the mean over equal micro-batches is the
        mean over the batch.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels)
