"""The sample order as PopTorch's loader wants it: single draws, whole host batches, no rest."""

from __future__ import annotations

import multiprocessing
from typing import Any, Dict, Iterator, Sequence, Union

import numpy as np
from torch.utils.data import Dataset

from cxr_vit.data.dataset import PADDING, Batch, ChestXrayDataset, Sample
from cxr_vit.data.sampler import EvaluationSampler, TrainingSampler
from cxr_vit.engines.host import leave_the_process_group

__all__ = ["PaddedDataset", "RowSampler"]


class PaddedDataset(Dataset[Sample]):
    """A split with a black film of row -1, which fills up the last host batch of an evaluation.

    Parameters
    ----------
    dataset
        The split.
    """

    def __init__(self, dataset: ChestXrayDataset) -> None:
        self.dataset = dataset

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Leave the group where an asynchronous loader's own process unpickles this."""
        self.__dict__.update(state)
        if multiprocessing.parent_process() is not None:
            leave_the_process_group()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """Read a batch; torch's loader asks for it this way."""
        real = [draw for draw in draws if draw != PADDING]
        assert list(draws[: len(real)]) == real, "padding ends a batch"
        return self.dataset.__getitems__(real).padded(len(draws))


class RowSampler:
    """The draws of a sampler's host batches one by one, each host batch full.

    A host batch is ordered ``[device iteration][accumulation][replica][micro-batch]``
    (poptorch.md, section 2). Of several processes each reads the rows of its own replicas, and all
    together those that one process would read.

    Parameters
    ----------
    sampler
        Yields host batches of all replicas.
    host_batch_size
        Rows of a full one; a shorter one is filled up with -1.
    micro_batch_size
        Samples in one forward pass of one replica.
    replicas
        All replicas.
    own
        The replicas of this process.
    """

    def __init__(
        self,
        sampler: Union[TrainingSampler, EvaluationSampler],
        *,
        host_batch_size: int,
        micro_batch_size: int,
        replicas: int,
        own: range,
    ) -> None:
        self.sampler = sampler
        self.host_batch_size = host_batch_size
        self.micro_batch_size = micro_batch_size
        self.replicas = replicas
        self.own = own

    def __iter__(self) -> Iterator[int]:
        for draws in self.sampler:
            full = np.full(self.host_batch_size, PADDING)
            full[: len(draws)] = draws
            by_replica = full.reshape(-1, self.replicas, self.micro_batch_size)
            yield from by_replica[:, list(self.own)].ravel().tolist()

    def __len__(self) -> int:
        return len(self.sampler) * self.host_batch_size // self.replicas * len(self.own)
