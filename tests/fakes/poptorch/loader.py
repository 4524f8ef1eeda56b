"""DataLoader: torch's, with combined batches, distributed processes and asynchronous loading."""

from __future__ import annotations

import logging
from typing import Any, Dict, Iterator, List, Optional

import torch

from .enums import DataLoaderMode
from .errors import python_error
from .options import Options
from .ring import AsynchronousDataAccessor
from .share import ProcessShare
from .structure import rebuild, tensors_of

__all__ = ["AsynchronousDataAccessor", "DataLoader"]

_logger = logging.getLogger("poptorch::python")


class DataLoader(torch.utils.data.DataLoader):
    """Yields combined batches: all micro-batches of one call of the model."""

    _accessor: Optional[AsynchronousDataAccessor] = None

    def __init__(
        self,
        options: Options,
        dataset: Any,
        batch_size: int = 1,
        shuffle: Optional[bool] = None,
        num_workers: int = 0,
        drop_last: bool = True,
        persistent_workers: Optional[bool] = None,
        auto_distributed_partitioning: bool = True,
        mode: DataLoaderMode = DataLoaderMode.Sync,
        async_options: Optional[Dict[str, Any]] = None,
        rebatched_worker_size: Optional[int] = None,
        batch_sampler: Optional[Any] = None,
        **kwargs: Any,
    ) -> None:
        self._own_sampler = batch_sampler is not None
        if batch_sampler is not None:
            _check_batch_sampler(options, batch_size, shuffle, auto_distributed_partitioning)
            batch_size = getattr(batch_sampler, "batch_size", batch_size)
        assert isinstance(options, Options)
        options._freeze()
        self._options = options
        self._set_combined(options, batch_size)
        self._drop_last = drop_last
        self._shares_shuffled = False
        if auto_distributed_partitioning and options.Distributed.numProcesses > 1:
            dataset = self._share(dataset, bool(shuffle))
            shuffle = shuffle and not self._shares_shuffled
        if not drop_last:
            self._warn_of_short_batch(dataset)
        remainder = not drop_last and (self._combined_batch_size or 0) > 1
        rebatched = mode == DataLoaderMode.AsyncRebatched or (
            mode == DataLoaderMode.Async and remainder
        )
        loaded_size = 1 if self._own_sampler else self._combined_batch_size
        if rebatched and rebatched_worker_size is not None:
            assert rebatched_worker_size <= (self._combined_batch_size or 0), (
                f"The rebatched_worker_size ({rebatched_worker_size}) must be <= to the combined"
                f" batch size ({self._combined_batch_size})"
            )
            loaded_size = rebatched_worker_size
        super().__init__(
            dataset,
            batch_size=loaded_size,
            shuffle=None if self._own_sampler else bool(shuffle),
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            drop_last=bool(drop_last and not self._own_sampler and not rebatched),
            persistent_workers=num_workers > 0
            if persistent_workers is None
            else persistent_workers,
            **kwargs,
        )
        if mode != DataLoaderMode.Sync:
            self._load_ahead(dict(async_options or {}), rebatched)

    def _load_ahead(self, async_options: Dict[str, Any], rebatched: bool) -> None:
        assert "rebatched_size" not in async_options, (
            "You cannot use DataLoaderMode.AsyncRebatched and manually specify the rebatched_size"
            " in async_options"
        )
        size = self._combined_batch_size if rebatched else None
        self._accessor = AsynchronousDataAccessor(self, **async_options, rebatched_size=size)

    def _set_combined(self, options: Options, batch_size: Optional[int]) -> None:
        self._combined_batch_size: Optional[int] = None
        self._num_batches: Optional[int] = None
        if batch_size is not None:
            self._num_batches = (
                options.device_iterations
                * options.replication_factor
                * options.Training.gradient_accumulation
            )
            self._combined_batch_size = batch_size * self._num_batches

    def _share(self, dataset: Any, shuffle: bool) -> Any:
        """Return this process's part of the dataset."""
        assert not isinstance(dataset, torch.utils.data.IterableDataset), (
            "auto_distributed_partitioning not supported for IterableDataset"
        )
        assert not shuffle or self._options.exists("random_seed"), (
            "When using auto_distributed_partitioning you must set poptorch.Options.randomSeed()"
            " to ensure that tensors are in the same order in all processes."
        )
        assert self._combined_batch_size is not None, (
            "batch_size=None not allowed when using auto_distributed_partitioning."
        )
        self._shares_shuffled = shuffle
        return ProcessShare(dataset, self._options, self._combined_batch_size, self._drop_last)

    def _warn_of_short_batch(self, dataset: Any) -> None:
        size = self._combined_batch_size
        if self._own_sampler or size is None or not hasattr(dataset, "__len__"):
            return
        if len(dataset) % size:
            _logger.warning(
                "The number of elements in the dataset (%d) is not divisible by the number of"
                " elements processed per step (%d) and drop_last=False. The last tensor will have"
                " a batch size of %d. To avoid having to handle this special case switch to"
                " drop_last=True",
                len(dataset),
                size,
                len(dataset) % size,
            )

    @property
    def rebatched_drop_last(self) -> bool:
        return self._drop_last

    @property
    def combinedBatchSize(self) -> Optional[int]:
        return self._combined_batch_size

    @property
    def options(self) -> Options:
        return self._options

    def __len__(self) -> int:
        size = self._accessor.rebatched_size if self._accessor is not None else None
        if not size:
            return super().__len__()
        number = len(self.dataset)
        return number // size if self._drop_last else -(-number // size)

    def __iter__(self) -> Any:
        if self._shares_shuffled:
            self.dataset.shuffle()
            self.dataset.swap_range()
        if self._accessor is not None:
            return iter(self._accessor)
        if self._own_sampler and self._num_batches != 1:
            return self._combined(super().__iter__())
        return super().__iter__()

    def _combined(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Combine the batches of a user's batch sampler."""
        waiting: List[Any] = []
        for batch in batches:
            waiting.append(batch)
            if len(waiting) == self._num_batches:
                yield _concatenate(waiting)
                waiting = []
        if waiting and not self._drop_last:
            yield _concatenate(waiting)

    def terminate(self) -> None:
        """End the asynchronous loading, if there is any."""
        if self._accessor is not None:
            self._accessor.terminate()

    def __del__(self) -> None:
        self.terminate()

    def __getstate__(self) -> Dict[str, Any]:
        # A copy for a worker loads by itself and has no running workers.
        return {**self.__dict__, "_accessor": None, "_iterator": None}


def _check_batch_sampler(options: Any, batch_size: int, shuffle: Any, automatic: bool) -> None:
    if batch_size != 1 or shuffle:
        raise python_error("`batch_sampler` option is mutually exclusive with batch_size, shuffle.")
    if options.Distributed.numProcesses > 1 and automatic:
        raise python_error(
            "`batch_sampler` option is mutually exclusive with auto_distributed_partitioning=True."
        )


def _concatenate(batches: List[Any]) -> Any:
    columns = zip(*(tensors_of(batch) for batch in batches))
    return rebuild(batches[-1], [torch.cat(column) for column in columns])
