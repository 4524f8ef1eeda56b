"""Data set and sample order as PopTorch's loader wants them: whole host batches, draw by draw."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver
from typing import Any, Dict, Iterator, Sequence

from torch.utils.data import Dataset

from cxr_vit.data.dataset import Batch, ChestXrayDataset, Sample
from cxr_vit.data.sampler import ReplicaSampler
from cxr_vit.engines.base import leave_the_process_group

__all__ = ["LoaderProcessDataset", "RowSampler", "start_fork_server"]


def start_fork_server() -> None:
    """Start the process that an asynchronous loader's process is forked from, SIGTERM ignored.

    It stays in the process group, where a signal to the group would end the loader. Its children
    restore the signal (`leave_the_process_group`).
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


class LoaderProcessDataset(Dataset[Sample]):
    """A split that may be read by an asynchronous loader's own process.

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
        return self.dataset.__getitems__(draws)


class RowSampler:
    """The draws of full host batches one by one.

    Parameters
    ----------
    batches
        Yields host batches of `host_batch_size` rows a replica of this process.
    batch_size
        Rows of one of them.
    """

    def __init__(self, batches: ReplicaSampler, *, batch_size: int) -> None:
        self.batches = batches
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        for draws in self.batches:
            yield from draws

    def __len__(self) -> int:
        return len(self.batches) * self.batch_size
