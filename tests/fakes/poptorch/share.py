"""The part of a dataset that one process reads, under poprun or mpirun."""

from __future__ import annotations

from typing import Any, Optional

import torch


class ProcessShare:
    """One contiguous block of the dataset per process; all have the same number of batches.

    Parameters
    ----------
    dataset
        The whole dataset.
    options
        Give the index of this process and the number of processes.
    size
        Samples of a combined batch.
    drop_last
        Whether to drop the samples that do not fill a batch in every process.
    """

    def __init__(self, dataset: Any, options: Any, size: int, drop_last: bool) -> None:
        processes, process = options.Distributed.numProcesses, options.Distributed.processId
        total = len(dataset)
        if drop_last:
            share = size * (total // (size * processes))
            self._offset = process * share
            self._length = min(share, total - self._offset)
            self._leftovers = total % share
        else:
            shares = [
                total // processes + (total % processes > number) for number in range(processes)
            ]
            self._offset = sum(shares[:process])
            self._length = shares[process]
            self._leftovers = 0
        self._first_offset = self._offset
        self._dataset = dataset
        self._seed = options.random_seed if options.exists("random_seed") else None
        self._generator: Optional[torch.Generator] = None
        self._order: Optional[torch.Tensor] = None

    def shuffle(self) -> None:
        """Draw a new order of the whole dataset, the same in every process."""
        if self._generator is None:
            assert self._seed is not None, (
                "Seed must be set when shuffling so that all instances end up with the same"
                " shuffled global indices."
            )
            self._generator = torch.Generator().manual_seed(self._seed)
        order = torch.randperm(len(self._dataset), generator=self._generator)
        if self._order is None:
            # In shared memory: persistent workers must see the next order.
            self._order = order.share_memory_()
        else:
            self._order.copy_(order)

    def swap_range(self) -> None:
        """Leave out other samples than last time."""
        first = self._offset == self._first_offset
        self._offset = self._first_offset + (self._leftovers if first else 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        index += self._offset
        return self._dataset[index if self._order is None else int(self._order[index])]

    def __getstate__(self) -> Any:
        # torch 2.0 cannot pickle a generator.
        return {**self.__dict__, "_generator": None}
