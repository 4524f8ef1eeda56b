"""Losses of several labels, by the names of `loss.name`."""

from __future__ import annotations

from typing import Callable, Dict, Optional

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cxr_vit.config.schema import LossSection

#: Logits, labels, the mask of known labels or None, and weights of positives or None -> the mean.
_Loss = Callable[[Tensor, Tensor, Optional[Tensor], Optional[Tensor], LossSection], Tensor]


def multi_label_loss(
    logits: Tensor,
    labels: Tensor,
    section: Optional[LossSection] = None,
    *,
    has_unknown: bool = False,
    positive_weight: Optional[Tensor] = None,
) -> Tensor:
    """Compute the mean loss over samples and labels, ``[B, C]``, in fp32.

    Without a `section` it is binary cross-entropy. `positive_weight`, ``[C]``, is for
    ``weighted_bce``.

    With `has_unknown`, labels of `UNKNOWN` count as a loss of 0. The divisor is B x C all the same:
    it is constant, so the mean over equal micro-batches is the mean over the batch.
    """
    section = section or LossSection()
    known = (labels >= 0).float() if has_unknown else None
    labels = labels if known is None else labels * known
    return LOSSES[section.name](logits.float(), labels, known, positive_weight, section)


def positive_weight(prevalence: np.ndarray, section: LossSection) -> Tensor:
    """Return the weights of positives, negatives / positives with a limit, float32 ``[C]``."""
    odds = (1.0 - prevalence) / prevalence
    return torch.from_numpy(np.minimum(odds, section.max_positive_weight)).float()


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    known: Optional[Tensor],
    weight: Optional[Tensor],
    section: LossSection,
) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels, weight=known, pos_weight=weight)


def _focal(
    logits: Tensor,
    labels: Tensor,
    known: Optional[Tensor],
    weight: Optional[Tensor],
    section: LossSection,
) -> Tensor:
    """Equation 4 of Lin et al. 2017, "Focal Loss for Dense Object Detection"."""
    return _focused(logits, labels, known, section.gamma, section.gamma, 0.0)


def _asymmetric(
    logits: Tensor,
    labels: Tensor,
    known: Optional[Tensor],
    weight: Optional[Tensor],
    section: LossSection,
) -> Tensor:
    """Equation 7 of Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification".

    The paper's code sums over labels, and takes the focus as a constant in the backward pass.
    """
    gammas = section.negative_gamma, section.positive_gamma
    return _focused(logits, labels, known, *gammas, section.clip)


def _focused(
    logits: Tensor,
    labels: Tensor,
    known: Optional[Tensor],
    negative_gamma: float,
    positive_gamma: float,
    clip: float,
) -> Tensor:
    """Weight the cross-entropy of each label by a power of how wrong the prediction is.

    The complement of a probability is a sigmoid of its own: 1 - p is 0 for p above 1 - 6e-8, and
    its logarithm infinite.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    negatives, present, absent = 1.0 - labels, torch.sigmoid(logits), torch.sigmoid(-logits)
    if clip:
        shifted = -(absent + clip).clamp(max=1.0).log()
        entropy = labels * entropy + negatives * shifted
        present = (present - clip).clamp(min=0.0)
    # A power of 0 is no operation of the graph: its slope at 0 may be 0 times infinity.
    of_positives = absent**positive_gamma if positive_gamma else 1.0
    of_negatives = present**negative_gamma if negative_gamma else 1.0
    loss = entropy * (labels * of_positives + negatives * of_negatives)
    return (loss if known is None else loss * known).mean()


LOSSES: Dict[str, _Loss] = {
    "bce": _cross_entropy,
    "weighted_bce": _cross_entropy,
    "focal": _focal,
    "asymmetric": _asymmetric,
}
