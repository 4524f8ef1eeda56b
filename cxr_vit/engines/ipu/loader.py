"""Host batches for IPUs, read by PopTorch's data loader."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, Optional, Sequence, Union

from torch.utils.data import Dataset

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import EngineSection
from cxr_vit.data.dataset import Batch, ChestXrayDataset, Sample, collate
from cxr_vit.data.sampler import EvaluationSampler, ReplicaSampler, TrainingSampler
from cxr_vit.data.spawn import without_main_module
from cxr_vit.engines.ipu.graphs import guarded
from cxr_vit.engines.workers import LoaderWatch, with_user_errors
from cxr_vit.errors import ConfigError, CxrVitError, DataError, DeviceError

if TYPE_CHECKING:
    import poptorch

#: Time for torch, in an asynchronous loader's process, to notice a hung worker first.
_LATER_S = 10.0


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
    engine
        How training batches are loaded; those of evaluation are assembled in this process.
    watch
        Explains a loader process that hangs or dies.
    timeout_s
        `data.worker_timeout_s`.

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
        engine: EngineSection,
        watch: LoaderWatch,
        timeout_s: Optional[float],
    ) -> None:
        import poptorch

        self._training = isinstance(sampler, TrainingSampler)
        # An asynchronous loader's process takes longer to start than a validation to run.
        self.mode = mode = engine.loader_mode if self._training else "sync"
        self._watch = watch
        self._timeout_s = timeout_s
        self._timed_out, self._others = False, multiprocessing.active_children()
        if isinstance(sampler, TrainingSampler):
            _check_whole_calls(sampler)
            micro_batch, host_batch = batch.micro_batch_size, batch.host_batch_size
        else:
            micro_batch, host_batch = batch.eval_micro_batch_size, batch.eval_host_batch_size
        replicas = batch.replicas if self._training else batch.eval_replicas
        own_host_batch = host_batch // replicas * len(own)
        draws = ReplicaSampler(
            sampler,
            host_batch_size=host_batch,
            micro_batch_size=micro_batch,
            replicas=replicas,
            own=own,
        )
        # The process of an asynchronous loader reports after its workers.
        workers = num_workers + (mode != "sync")
        start = watch.start(dataset, training=self._training, workers=workers)
        make_loader = partial(
            poptorch.DataLoader,
            options,
            LoaderProcessDataset(dataset, partial(start, num_workers)),
            batch_size=micro_batch,
            sampler=RowSampler(draws, batch_size=own_host_batch),
            num_workers=num_workers,
            persistent_workers=False,
            collate_fn=collate,
            worker_init_fn=start,
            auto_distributed_partitioning=False,
            **self._mode_settings(engine, num_workers, own_host_batch),
        )
        self.is_open = False
        begun_s = time.monotonic()
        try:
            with without_main_module(), self._limit(num_workers):
                self._loader = guarded("starting the loader", make_loader)
        except DeviceError as error:
            raise self._start_error(error, time.monotonic() - begun_s) from error
        self.is_open = True
        self._num_workers = num_workers

    def _start_error(self, error: DeviceError, seconds: float) -> CxrVitError:
        """Return the error of a loader that did not start within `seconds`."""
        if self.mode != "sync" and self._timeout_s is not None and seconds >= self._timeout_s:
            self._timed_out = True  # torch, in the loader's process, noticed a hung worker first
        return self._timeout_error() or error

    def _mode_settings(
        self, engine: EngineSection, num_workers: int, own_host_batch: int
    ) -> Dict[str, Any]:
        import poptorch

        modes = {
            "sync": poptorch.DataLoaderMode.Sync,
            "async": poptorch.DataLoaderMode.Async,
            "async_rebatched": poptorch.DataLoaderMode.AsyncRebatched,
        }
        settings: Dict[str, Any] = {"mode": modes[self.mode]}
        if num_workers > 0:
            settings["timeout"] = self._timeout_s or 0
        if self.mode != "sync":
            with without_main_module():
                _start_fork_server()
            settings["async_options"] = {
                "buffer_size": engine.loader_buffer_size,
                "early_preload": engine.loader_early_preload,
                # Otherwise the process would read the data once more after its end.
                "load_indefinitely": False,
            }
            if num_workers > 0:
                # With a fork server the workers would outlive the loader's process.
                settings["multiprocessing_context"] = "fork"
        if self.mode == "async_rebatched":
            size = engine.rebatched_worker_size or -(-own_host_batch // max(1, num_workers))
            if size > own_host_batch:  # under poprun, less than the configuration's host batch
                raise ConfigError(
                    f"engine.rebatched_worker_size={size} is more than the {own_host_batch} samples"
                    f" of a host batch of this process. Set it to {own_host_batch} or less."
                )
            settings["rebatched_worker_size"] = size
        return settings

    def __iter__(self) -> Iterator[Batch]:
        return with_user_errors(self._batches(), self._watch, training=self._training)

    def _batches(self) -> Iterator[Batch]:
        try:
            # An asynchronous loader yields lists.
            batches = iter(self._loader)
            while True:
                with self._limit(self._num_workers):
                    batch = next(batches, None)
                if batch is None:
                    return
                images, labels, indices = batch
                # The next batch overwrites the buffers. The images are not used after the step.
                yield Batch(images, labels.clone(), indices.clone())
        except AssertionError as error:
            if self.mode == "sync":
                raise
            # PopTorch raises it without a message when the loader's process ends.
            raise self._timeout_error() or DataError(
                f"the loader's process ended; its own error is printed above."
                f"{self._watch.reading(self._training)} engine.loader_mode=sync reads in this"
                " process and reports it in one line."
            ) from error
        finally:
            self.close()

    @contextlib.contextmanager
    def _limit(self, num_workers: int) -> Iterator[None]:
        """Kill an asynchronous loader's processes if they give no batch within the body.

        PopTorch waits for them without limit.
        """
        if self.mode == "sync" or self._timeout_s is None:
            yield
            return
        seconds = self._timeout_s + (_LATER_S if num_workers else 0)
        timer = threading.Timer(seconds, self._kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill(self) -> None:
        self._timed_out = True
        self._watch.kill(self._training)
        for process in multiprocessing.active_children():  # one that has not reported yet
            if process not in self._others:
                process.kill()

    def _timeout_error(self) -> Optional[DataError]:
        if not self._timed_out or self._timeout_s is None:
            return None
        return self._watch.timed_out(self._training, self._timeout_s)

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
    """A split that an asynchronous loader's process may read; it calls `start` first."""

    def __init__(self, dataset: ChestXrayDataset, start: Callable[[], None]) -> None:
        self.dataset = dataset
        self.start = start
        self._main = os.getpid()

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Leave the signal group if the loader's process unpickles this."""
        self.__dict__.update(state)
        if os.getpid() != self._main:  # a process has no parent_process() yet while it unpickles
            self.start()

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
