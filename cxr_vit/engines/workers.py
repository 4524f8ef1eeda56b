"""Loader processes: keep signals from them, and explain one that hangs or dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from functools import partial
from typing import Callable, Dict, Iterable, Iterator, Optional, Tuple

import torch
from torch import Tensor

from cxr_vit.data.dataset import Batch, ChestXrayDataset, report_to
from cxr_vit.engines.allocator import drop_freed_memory
from cxr_vit.errors import DataError

#: A killed process ends at once, unless the system itself waits for a device.
_END_S = 5.0


def leave_signal_group() -> None:
    """Keep a signal to the whole group (Ctrl-C, `timeout`) from a loader worker.

    The main process saves the run and then ends its workers. Ignoring signals here would also
    ignore those of the main process.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class LoaderWatch:
    """What the loader processes of an engine are reading, to explain one that hangs or dies.

    Each writes its process id and the row it reads into shared memory, without a lock. An engine
    has one loader for training and one for scoring at a time.
    """

    def __init__(self) -> None:
        self._loaders: Dict[bool, Tuple[ChestXrayDataset, Tensor]] = {}

    def start(
        self, dataset: ChestXrayDataset, *, training: bool, workers: int
    ) -> Callable[[int], None]:
        """Watch a new loader; return the function that its processes call with their number."""
        entries = self._loaders[training][1] if training in self._loaders else torch.empty(0, 2)
        if len(entries) != workers:
            entries = torch.empty(workers, 2, dtype=torch.int64).share_memory_()
        self._loaders[training] = dataset, entries.fill_(-1)
        return partial(_start_worker, entries)

    def reading(self, training: bool) -> str:
        """Return a sentence, after a space, about what each process is reading; or ""."""
        dataset, entries = self._loaders[training]
        reading = [
            f"process {number} was reading {dataset.describe(row)}"
            for number, (_, row) in enumerate(entries.tolist())
            if row >= 0
        ]
        return f" Loader {', '.join(reading)}." if reading else ""

    def kill(self, training: bool) -> None:
        """Kill the processes of a loader, which need not be children of this one."""
        for pid in self._loaders[training][1][:, 0].tolist():
            if pid > 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def timed_out(self, training: bool, timeout_s: float) -> DataError:
        """Return the error for a loader without a batch, after ending its processes."""
        reading = self.reading(training) or " None of them was reading an image."
        self.end_processes()
        return DataError(
            f"the loader processes gave no batch for {timeout_s:g} s.{reading} Is the file system"
            " hung? Raise data.worker_timeout_s if it is only slow. Resume with --resume."
        )

    def dead_worker(self, error: Optional[BaseException]) -> Optional[DataError]:
        """Return a DataError for the plain RuntimeError that torch raises if a worker died."""
        if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker"):
            return None
        pids = {int(number) for number in re.findall(r"\d+", str(error))}
        reading = [
            dataset.describe(row)
            for dataset, entries in self._loaders.values()
            for pid, row in entries.tolist()
            if pid in pids and row >= 0
        ]
        was_reading = f" It was reading {', '.join(reading)}." if reading else ""
        self.end_processes()
        return DataError(
            f"{str(error).strip()}{was_reading}\nOut of memory, or of /dev/shm? Lower"
            " data.num_workers and resume with --resume."
        )

    def end_processes(self) -> None:
        """Kill all loader processes: one that hangs ignores torch, which would wait for each.

        Python waits at its end for every process, without limit.
        """
        pids = {pid for _, entries in self._loaders.values() for pid in entries[:, 0].tolist()}
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Torch's handler would raise an error for each.
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
        for process in multiprocessing.active_children():
            if process.pid in pids:
                process.kill()
                process.join(_END_S)
        if in_main_thread:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _start_worker(entries: Tensor, number: int) -> None:
    leave_signal_group()
    drop_freed_memory()
    report_to(entries[number])


def with_user_errors(
    loader: Iterable[Batch], watch: LoaderWatch, *, training: bool
) -> Iterator[Batch]:
    """Yield the batches; raise a failure of a loader worker as a short DataError."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(_original_message(error)) from None
    except RuntimeError as error:
        timeout = re.match(r"DataLoader timed out after ([\d.e+-]+) seconds", str(error))
        if timeout:
            raise watch.timed_out(training, float(timeout.group(1))) from error
        dead_worker = watch.dead_worker(error)
        if dead_worker is None:
            raise
        raise dead_worker from error


def _original_message(error: DataError) -> str:
    """Return the message without the traceback that torch adds to a worker's error.

    torch sends only the exception's class and its formatted traceback from a worker, and raises
    the class with that text (`torch._utils.ExceptionWrapper`): no attribute survives. The original
    message follows the last occurrence of the class's name.
    """
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return str(error).rpartition(name)[2].strip()
