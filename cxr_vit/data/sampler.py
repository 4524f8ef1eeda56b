"""The samples of each step, a pure function of (seed, step).

The samples form one endless stream: all in a random order, then all in another, and so on. Step k
takes the k-th global batch from it. No sample is dropped at the end of an epoch, resuming needs no
saved state, and every engine sees the same order.

Samplers yield draws: ``epoch * num_samples + row``. The data set takes the row from a draw, and the
augmentation also the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Iterator, List, Optional, Union

import numpy as np

#: The draw, and the index, of a sample that only pads a batch.
PADDING = -1


@lru_cache(maxsize=2)  # a step needs its own epoch and rarely the next
def _order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


@dataclass(eq=False)
class TrainingSampler:
    """The host batches of the steps ``start_step <= k < total_steps``, as lists of draws."""

    num_samples: int  # size of the training split
    global_batch_size: int  # samples per step
    device_iterations: int  # steps per host batch
    seed: int
    start_step: int
    total_steps: int

    def draws(self, step: int) -> np.ndarray:
        """Return the draws of a step, int64 ``[global_batch_size]``."""
        positions = np.arange(self.global_batch_size) + step * self.global_batch_size
        epochs, offsets = np.divmod(positions, self.num_samples)
        draws = epochs * self.num_samples
        for epoch in np.unique(epochs):
            here = epochs == epoch
            draws[here] += _order(self.num_samples, self.seed, int(epoch))[offsets[here]]
        return draws

    def __iter__(self) -> Iterator[List[int]]:
        for step in range(self.start_step, self.total_steps, self.device_iterations):
            steps = range(step, min(step + self.device_iterations, self.total_steps))
            yield np.concatenate([self.draws(k) for k in steps]).tolist()

    def __len__(self) -> int:
        return -(-(self.total_steps - self.start_step) // self.device_iterations)


@dataclass(eq=False)
class EvaluationSampler:
    """All rows of a split once, in order, in host batches; the last may be shorter."""

    num_samples: int
    batch_size: int

    def __iter__(self) -> Iterator[List[int]]:
        for start in range(0, self.num_samples, self.batch_size):
            yield list(range(start, min(start + self.batch_size, self.num_samples)))

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)


@dataclass(eq=False)
class ReplicaSampler:
    """The parts of a sampler's host batches that belong to some of the replicas.

    A host batch is ordered ``[device iteration][accumulation][replica][micro-batch]``, as PopTorch
    splits its combined batch. Each process reads the rows of its own replicas; together they read
    the rows that a single process would.
    """

    sampler: Union[TrainingSampler, EvaluationSampler]
    host_batch_size: Optional[int]  # to which `PADDING` extends each host batch; None keeps it
    micro_batch_size: int  # samples in one forward pass of one replica
    replicas: int  # of all processes
    own: range  # the replicas to read

    def __iter__(self) -> Iterator[List[int]]:
        for draws in self.sampler:
            full = np.full(self.host_batch_size or len(draws), PADDING)
            full[: len(draws)] = draws
            by_replica = full.reshape(-1, self.replicas, self.micro_batch_size)
            yield by_replica[:, list(self.own)].ravel().tolist()

    def __len__(self) -> int:
        return len(self.sampler)
