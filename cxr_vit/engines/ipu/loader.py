"""Host batches for IPUs, read by PopTorch's data loader."""

from __future__ import annotations

import multiprocessing
import signal
from functools import partial
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any, Dict, Iterator, Sequence, Union

from torch.utils.data import Dataset

from cxr_vit.config.plans import BatchPlan
from cxr_vit.data.dataset import Batch, ChestXrayDataset, Sample, collate
from cxr_vit.data.sampler import EvaluationSampler, ReplicaSampler, TrainingSampler
from cxr_vit.data.spawn import without_main_module
from cxr_vit.engines.base import leave_signal_group, with_user_errors
from cxr_vit.engines.ipu.graphs import guarded
from cxr_vit.errors import ConfigError, DataError

if TYPE_CHECKING:
    import poptorch


class HostBatchLoader:
    """All host batches of this process, each of them full; to be iterated once.

    Parameters
    ----------
    options
        Options of the graph that computes the batches.
    sampler
        Yields host batches of all replicas.
    own
        The replicas of this process.
    mode
        `engine.loader_mode`.

    Raises
    ------
    ConfigError
        If the remaining steps are not a whole number of host calls.
    """

    def __init__(
        self,
        options: poptorch.Options,
        dataset: ChestXrayDataset,
        sampler: Union[TrainingSampler, EvaluationSampler],
        batch: BatchPlan,
        own: range,
        *,
        num_workers: int,
        mode: str,
    ) -> None:
        import poptorch

        if isinstance(sampler, TrainingSampler):
            _check_whole_calls(sampler)
            micro_batch, host_batch = batch.micro_batch_size, batch.host_batch_size
        else:
            micro_batch, host_batch = batch.eval_micro_batch_size, batch.eval_host_batch_size
        own_host_batch = host_batch // batch.replicas * len(own)
        draws = ReplicaSampler(
            sampler,
            host_batch_size=host_batch,
            micro_batch_size=micro_batch,
            replicas=batch.replicas,
            own=own,
        )
        modes = {
            "sync": poptorch.DataLoaderMode.Sync,
            "async": poptorch.DataLoaderMode.Async,
            "async_rebatched": poptorch.DataLoaderMode.AsyncRebatched,
        }
        more: Dict[str, Any] = {}
        if mode != "sync":
            with without_main_module():
                _start_fork_server()
            # Otherwise the process would read the data once more after its end.
            more["async_options"] = {"load_indefinitely": False}
            if num_workers > 0:
                # With a fork server the workers would outlive the loader's process.
                more["multiprocessing_context"] = "fork"
        if mode == "async_rebatched":
            more["rebatched_worker_size"] = -(-own_host_batch // max(1, num_workers))
        make_loader = partial(
            poptorch.DataLoader,
            options,
            LoaderProcessDataset(dataset),
            batch_size=micro_batch,
            sampler=RowSampler(draws, batch_size=own_host_batch),
            num_workers=num_workers,
            persistent_workers=False,
            collate_fn=collate,
            worker_init_fn=leave_signal_group,
            auto_distributed_partitioning=False,
            mode=modes[mode],
            **more,
        )
        self.mode = mode
        self.is_open = True
        with without_main_module():
            self._loader = guarded("starting the loader", make_loader)

    def __iter__(self) -> Iterator[Batch]:
        return with_user_errors(self._batches())

    def _batches(self) -> Iterator[Batch]:
        try:
            # An asynchronous loader yields lists.
            for images, labels, indices in self._loader:
                # The next batch overwrites the buffers. The images are not used after the step.
                yield Batch(images, labels.clone(), indices.clone())
        except AssertionError as error:
            if self.mode == "sync":
                raise
            # PopTorch raises it without a message when the loader's process ends.
            raise DataError(
                "the loader's process ended; its own error is printed above."
                " engine.loader_mode=sync reads in this process and reports it in one line."
            ) from error
        finally:
            self.close()

    def close(self) -> None:
        """End the loader's process."""
        if self.is_open:
            self.is_open = False
            self._loader.terminate()


def _check_whole_calls(sampler: TrainingSampler) -> None:
    left, iterations = sampler.total_steps - sampler.start_step, sampler.device_iterations
    if left % iterations:
        raise ConfigError(
            f"{left} steps are left of {sampler.total_steps}, no multiple of"
            f" batch.device_iterations={iterations}, and the graph has a fixed shape. Set"
            " batch.device_iterations to the value the run started with, or to 1."
        )


def _start_fork_server() -> None:
    """Start the process that an asynchronous loader's process is forked from, SIGTERM ignored.

    It stays in the process group, where a signal to the group would end the loader. Its children
    restore the signal (`leave_signal_group`).
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


class LoaderProcessDataset(Dataset[Sample]):
    """A split that an asynchronous loader's process may read."""

    def __init__(self, dataset: ChestXrayDataset) -> None:
        self.dataset = dataset

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Leave the signal group if the loader's process unpickles this."""
        self.__dict__.update(state)
        if multiprocessing.parent_process() is not None:
            leave_signal_group()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """Read a batch."""
        return self.dataset.__getitems__(draws)


class RowSampler:
    """The draws of host batches one by one; each batch has `batch_size` of them."""

    def __init__(self, batches: ReplicaSampler, *, batch_size: int) -> None:
        self.batches = batches
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        for draws in self.batches:
            yield from draws

    def __len__(self) -> int:
        return len(self.batches) * self.batch_size
