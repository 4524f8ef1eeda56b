"""Engine: what every back end does. One operation is common: a host batch in, its updates out."""

from __future__ import annotations

import os
import resource
import signal
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from multiprocessing import forkserver
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, TypeVar, Union

import torch
from torch import Tensor

from cxr_vit.config.plans import BatchPlan
from cxr_vit.data.dataset import Batch, ChestXrayDataset
from cxr_vit.data.sampler import EvaluationSampler, TrainingSampler
from cxr_vit.errors import DataError

__all__ = [
    "Engine",
    "EngineState",
    "StepOutput",
    "in_one_line",
    "leave_the_process_group",
    "process_peak_gib",
    "start_fork_server",
]


EngineType = TypeVar("EngineType", bound="Engine")


class StepOutput(NamedTuple):
    """What the updates of one host batch gave.

    `losses` float32 ``[device_iterations]`` on the CPU, each the mean over every micro-batch of its
    update; `grad_norm` float32 ``[device_iterations]`` before clipping (0 for a skipped update),
    None where the device cannot report it.
    """

    losses: Tensor
    grad_norm: Optional[Tensor]
    num_samples: int


@dataclass
class EngineState:
    """All an engine needs to go on: by hub name, so that any engine can take it up.

    Attributes
    ----------
    weights
        Hub name -> tensor.
    optimizer
        Hub name -> slot (`exp_avg`, `exp_avg_sq`, `step`) -> tensor.
    optimizer_kind
        Which optimizer's slots these are; empty: weights only, the optimizer starts anew.
    scalars
        The rest as JSON numbers (update count, loss scale).
    rng
        The device's random generator, int64; None where dropout is a function of the update.
    """

    weights: Dict[str, Tensor]
    optimizer: Dict[str, Dict[str, Tensor]] = field(default_factory=dict)
    optimizer_kind: str = ""
    scalars: Dict[str, float] = field(default_factory=dict)
    rng: Optional[Tensor] = None


class Engine(ABC):
    """A back end. Public methods check, underscored hooks work; a context manager.

    Parameters
    ----------
    batch
        The batch arithmetic.

    Attributes
    ----------
    local_batch
        The part of it that this process reads and computes: all, where there is one process.
    is_main
        Whether this process is the one that writes and prints.
    place
        What a stage runs on, in a word.
    failed
        Whether the engine is closed because of an error.
    """

    def __init__(self, batch: BatchPlan) -> None:
        self.batch = batch
        self.local_batch = batch
        self.is_main = True
        self.place = "stage"
        self.failed = False

    def __enter__(self: EngineType) -> EngineType:
        return self

    def __exit__(self, *exception: object) -> None:
        self.failed = exception[0] is not None
        self.close()

    @abstractmethod
    def describe(self) -> str:
        """Say in a line what computes, in which arithmetic, and why."""

    @abstractmethod
    def loader(
        self,
        dataset: ChestXrayDataset,
        sampler: Union[TrainingSampler, EvaluationSampler],
        *,
        training: bool,
    ) -> Iterable[Batch]:
        """Return the host batches of `dataset` in the order of `sampler`."""

    def compile(self, example: Batch) -> float:
        """Do what happens once before the first step; return the seconds it took."""
        self._check(example, self.local_batch.global_batch_size)
        return self._compile(example)

    def train_step(self, batch: Batch, *, lr: float) -> StepOutput:
        """Make the weight updates of one host batch.

        Parameters
        ----------
        batch
            A whole number of global batches (this process's part of them), in the order of the
            updates.
        lr
            The learning rate of all of them.
        """
        self._check(batch, self.local_batch.global_batch_size)
        return self._train_step(batch, lr)

    def predict(self, batch: Batch) -> Tensor:
        """Return the logits of a host batch, float32 ``[B, C]`` on the CPU, padding included."""
        self._check(batch, self.batch.eval_micro_batch_size)
        return self._predict(batch)

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them must ask at the same time."""
        return flag

    def predict_dataset(self, dataset: ChestXrayDataset) -> Tuple[Tensor, Tensor]:
        """Score every image of a split exactly once.

        Returns
        -------
        tuple of Tensor
            Logits and labels, float32 ``[N, C]`` each, in the split's order.
        """
        sampler = EvaluationSampler(len(dataset), batch_size=self.batch.eval_host_batch_size)
        logits: List[Tensor] = []
        labels: List[Tensor] = []
        indices: List[Tensor] = []
        for batch in self.loader(dataset, sampler, training=False):
            real = batch.indices >= 0
            logits.append(self.predict(batch)[real])
            labels.append(batch.labels[real].clone())
            indices.append(batch.indices[real].clone())
        parts = (torch.cat(part) for part in (logits, labels, indices))
        all_logits, all_labels, scored = self._gather(*parts)
        order = scored.argsort()
        assert torch.equal(scored[order], torch.arange(len(dataset))), "each image once"
        return all_logits[order], all_labels[order]

    @abstractmethod
    def state_dict(self) -> EngineState:
        """Return copies of all that is needed to go on, on the CPU.

        All processes must ask at the same time; the one that `is_main` gets the whole.
        """

    @abstractmethod
    def load_state_dict(self, state: EngineState) -> None:
        """Take up where `state` was taken.

        Raises
        ------
        CheckpointError
            If it is of another model or optimizer.
        """

    @abstractmethod
    def device_stats(self) -> Dict[str, float]:
        """Return what the device says of itself, tag -> value: peak memory in GiB (2**30 bytes)."""

    def close(self) -> None:  # noqa: B027  (most back ends hold nothing)
        """Give the device back."""

    @abstractmethod
    def _compile(self, example: Batch) -> float: ...

    @abstractmethod
    def _train_step(self, batch: Batch, lr: float) -> StepOutput: ...

    @abstractmethod
    def _predict(self, batch: Batch) -> Tensor: ...

    def _gather(self, *parts: Tensor) -> Tuple[Tensor, ...]:
        """Put together what the processes have of something; one process has all."""
        return parts

    def _check(self, batch: Batch, unit: int) -> None:
        assert batch.images.dtype == torch.uint8, batch.images.dtype
        assert batch.images.dim() == 4 and batch.images.shape[1] == 1, batch.images.shape
        size = len(batch.images)
        assert size > 0 and size % unit == 0, f"{size} samples are no multiple of {unit}"
        assert len(batch.labels) == len(batch.indices) == size


def leave_the_process_group(worker: int = 0) -> None:
    """Let a signal to the whole group (Ctrl-C, `timeout`) reach only the process that saves.

    To ignore signals instead would also ignore the main process's own, which ends its workers.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def start_fork_server() -> None:
    """Start the process that an asynchronous loader's process is forked from, deaf to SIGTERM.

    It stays in the group, and with it a signal to the group would end the loader. What is forked
    from it listens again (`leave_the_process_group`).
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


def in_one_line(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Pass batches on; a worker process's DataError loses the traceback torch wraps it in."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None


def process_peak_gib() -> float:
    """Return the most memory this process has held, in GiB (2**30 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
