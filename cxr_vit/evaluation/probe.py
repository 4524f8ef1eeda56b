"""Fit the heads of a linear probe: logistic regression of every label on frozen features.

All heads of a grid are one tensor ``[F, G, C]`` and descend together. A head minimises, for each
label, the mean cross-entropy over the images where the label is known, plus half the weight decay
times the squared norm of its weights on standardised features; the bias is free. This is
scikit-learn's `LogisticRegression` with ``C = 1 / (images x weight decay)``.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from cxr_vit.data.records import UNKNOWN
from cxr_vit.evaluation.metrics import Scores, flat_scores

#: A head has converged if no entry of its gradient is larger: its AUROCs then no longer change.
_TOLERANCE = 1e-6


class Head(NamedTuple):
    """Weight ``[C, F]`` and bias ``[C]`` of a linear layer, float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Map ``[N, F]`` to ``[N, C]``."""
        return features @ self.weight.T + self.bias


class Fit(NamedTuple):
    """A head, its weight decay, and the largest entry of its gradient after `steps` steps."""

    head: Head
    weight_decay: float
    steps: int
    gradient: float

    @property
    def has_converged(self) -> bool:
        """Whether further steps would change nothing that counts."""
        return self.gradient <= _TOLERANCE


class _Basis(NamedTuple):
    """Features in coordinates where their covariance is diagonal.

    ``values = (features - mean) @ rotation``, with the division by the standard deviations in
    `rotation`. `spectrum` has the eigenvalues of the covariance, ``[F]``.
    """

    values: Tensor
    mean: Tensor
    rotation: Tensor
    spectrum: Tensor

    @classmethod
    def of(cls, features: Tensor) -> _Basis:
        exact = features.double()
        mean, std = exact.mean(dim=0), exact.std(dim=0, unbiased=False)
        std[std <= 1e-6 * std.max()] = 1.0  # constant
        exact = (exact - mean) / std
        spectrum, rotation = torch.linalg.eigh(exact.T @ exact / len(exact))
        values = (exact @ rotation).float()
        return cls(values, mean, rotation / std.unsqueeze(1), spectrum.clamp(min=0).float())

    def head(self, weight: Tensor, bias: Tensor) -> Head:
        """Return the head for the features themselves, of weights ``[F, C]`` in this basis."""
        own = self.rotation @ weight.double()
        return Head(own.T.float().contiguous(), (bias.double() - self.mean @ own).float())


def fit_heads(
    features: Tensor, labels: Tensor, *, weight_decays: Sequence[float], steps: int
) -> List[Fit]:
    """Fit a head for each weight decay, given ``[N, F]`` and ``[N, C]`` (0, 1 or `UNKNOWN`).

    Accelerated gradient descent over all images, with at most `steps` steps. In the basis of the
    covariance each coordinate has its own largest stable rate: the Hessian of the cross-entropy is
    at most a quarter of the covariance (Böhning and Lindsay, 1988), so a fixed diagonal bounds it.
    The bare descent, whose only rate is that of the largest eigenvalue, needs thousands of steps.
    The head of a label without known positives, or without known negatives, stays at its start: no
    weights, and the log-odds of the prevalence as bias.
    """
    basis = _Basis.of(features)
    descent = _Descent(basis, labels, torch.tensor(list(weight_decays)))
    taken, gradients = descent.run(steps)
    return [
        Fit(basis.head(descent.weight[:, g], descent.bias[g]), decay, taken, gradient)
        for g, (decay, gradient) in enumerate(zip(weight_decays, gradients))
    ]


class _Descent:
    """Nesterov's descent of all heads; `weight` is ``[F, G, C]``, `bias` ``[G, C]``."""

    def __init__(self, basis: _Basis, labels: Tensor, decays: Tensor) -> None:
        self.values = basis.values
        known = (labels != UNKNOWN).float()
        self.labels = labels * known
        count, positives = known.sum(dim=0), self.labels.sum(dim=0)
        known[:, (positives == 0) | (positives == count)] = 0
        #: Weight of each image in the mean over the known ones, ``[N, 1, C]``.
        self.shares = (known / count.clamp(min=1)).unsqueeze(1)
        self.labels = self.labels.unsqueeze(1)
        self.decays = decays.view(1, -1, 1)
        # Where a label is known for some images only, their covariance may be larger by the ratio.
        scale = (len(labels) / count.clamp(min=1)) / 4
        bound = basis.spectrum.view(-1, 1, 1) * scale + self.decays
        self.rates = 1 / bound.clamp(min=1e-7 * float(bound.max()))
        self.bias_rates = 1 / scale
        num_features, num_heads = len(basis.spectrum), len(decays)
        self.weight = torch.zeros(num_features, num_heads, labels.shape[1])
        prior = (positives + 0.5) / (count + 1)
        self.bias = torch.log(prior / (1 - prior)).repeat(num_heads, 1)

    def gradient(self, weight: Tensor, bias: Tensor) -> Tuple[Tensor, Tensor]:
        """Return the gradient of the loss of each head and label."""
        count, num_heads, num_labels = weight.shape
        logits = (self.values @ weight.view(count, -1)).view(-1, num_heads, num_labels) + bias
        errors = logits.sigmoid_().sub_(self.labels).mul_(self.shares)
        of_weight = (self.values.T @ errors.view(len(errors), -1)).view_as(weight)
        return of_weight + self.decays * weight, errors.sum(dim=0)

    def run(self, steps: int) -> Tuple[int, List[float]]:
        """Descend; return the steps taken and the largest entry of each head's gradient."""
        weight, bias = self.weight, self.bias  # extrapolated
        momentum = torch.ones(self.bias.shape)
        largest = torch.zeros(len(self.bias))
        step = 0
        while step < steps:
            of_weight, of_bias = self.gradient(weight, bias)
            largest = torch.maximum(of_weight.abs().amax(dim=(0, 2)), of_bias.abs().amax(dim=1))
            if bool((largest <= _TOLERANCE).all()):
                self.weight, self.bias = weight, bias  # whose gradient it is
                break
            step += 1
            new_weight = weight - self.rates * of_weight
            new_bias = bias - self.bias_rates * of_bias
            moved, moved_bias = new_weight - self.weight, new_bias - self.bias
            # Where the momentum leads uphill it starts again (O'Donoghue and Candès, 2015).
            uphill = (of_weight * moved).sum(dim=0) + of_bias * moved_bias > 0
            following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
            factor = torch.where(uphill, torch.zeros_like(momentum), (momentum - 1) / following)
            momentum = torch.where(uphill, torch.ones_like(momentum), following)
            self.weight, self.bias = new_weight, new_bias
            weight, bias = new_weight + factor * moved, new_bias + factor * moved_bias
        return step, largest.tolist()


class Scored(NamedTuple):
    """A head of the grid with its scores on the validation images."""

    fit: Fit
    scores: Scores

    @property
    def auroc(self) -> Optional[float]:
        """Mean AUROC of the findings, None if it is undefined for all."""
        return self.scores["auroc_macro"]


def score_heads(
    fits: Sequence[Fit], features: Tensor, labels: Tensor, names: Sequence[str]
) -> List[Scored]:
    """Score the heads on the validation images, features ``[N, F]`` and labels ``[N, C]``."""
    return [Scored(fit, flat_scores(fit.head.logits(features), labels, names)) for fit in fits]
