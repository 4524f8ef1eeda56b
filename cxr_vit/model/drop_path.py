"""Stochastic depth (Huang et al. 2016): in training an image skips branches of layers at random.

Each branch of a layer, attention and MLP, is drawn on its own: its output is 0 with the layer's
probability p, otherwise it is divided by 1 - p, as in timm. The draws are a pure function of
(seed, update, row in the split, branch). Thus every engine, cut and batch arithmetic makes the
same ones, and so does a resumed run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    """Return the next output of splitmix64 (Steele, Lea and Flood 2014, figure 17)."""
    z = state + _STEP
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, updates: np.ndarray, rows: np.ndarray, branches: int) -> np.ndarray:
    """Return numbers in [0, 1), float64 ``[B, branches]``, for int64 ``[B]`` updates and rows."""
    state = _mix(np.array([[seed]], dtype=np.uint64))
    for part in (updates[:, None], rows[:, None], np.arange(branches)):
        state = _mix(state ^ part.astype(np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class DropPath:
    """The draws of a run: `rate` is the probability of the last layer, the first one has 0."""

    rate: float
    depth: int
    seed: int

    def factors(self, update: int, rows: Tensor, per_update: int) -> Optional[Tensor]:
        """Return the factor on each branch's output, or None at a rate of 0.

        Parameters
        ----------
        update
            Number of the first update.
        rows
            int64 ``[B]``, row in the split, `per_update` for each update.

        Returns
        -------
        Tensor
            float32 ``[B, 2 * depth]``: attention and MLP of the first layer, of the second, ...
        """
        if self.rate == 0:
            return None
        skipped = np.linspace(0, self.rate, self.depth).repeat(2)
        updates = update + np.arange(len(rows)) // per_update
        drawn = uniform(self.seed, updates, rows.numpy(), len(skipped))
        factors = np.where(drawn < skipped, 0.0, 1 / (1 - skipped))
        return torch.from_numpy(factors.astype(np.float32))
