"""Interface of the engines: a host batch in, its weight updates out."""

from __future__ import annotations

import resource
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Tuple,
    TypeVar,
    Union,
)

import torch
from torch import Tensor

from cxr_vit.config.plans import BatchPlan
from cxr_vit.data.dataset import Batch, ChestXrayDataset
from cxr_vit.data.sampler import EvaluationSampler, TrainingSampler
from cxr_vit.engines.workers import LoaderWatch
from cxr_vit.model.module import ViTModule

EngineType = TypeVar("EngineType", bound="Engine")


class Interrupted(Exception):
    """The scoring of a split was stopped before its end."""


class StageRange(NamedTuple):
    """Output values of one stage."""

    stage: int
    #: Of the finite values; infinite the wrong way round if there are none.
    smallest: float
    largest: float
    #: Number of values that are NaN or infinite.
    num_nonfinite: int


class StepOutput:
    """Result of the weight updates of one host batch; tensors are float32 and on the CPU.

    A GPU may still be computing it: then `losses` and `grad_norm` wait for the device.

    Parameters
    ----------
    losses
        ``[device_iterations]``, each the mean over all micro-batches of one update.
    grad_norm
        ``[device_iterations]``, before clipping, 0 for a skipped update; None if not available.
    num_samples
        Samples of all processes.
    copied
        The event after which the device has written both, such as torch.cuda.Event; None if they
        are there.

    Attributes
    ----------
    num_updates
        Number of updates, known at once.
    """

    def __init__(
        self, losses: Tensor, grad_norm: Optional[Tensor], num_samples: int, copied: Any = None
    ) -> None:
        self.num_updates = len(losses)
        self.num_samples = num_samples
        self._losses, self._grad_norm, self._copied = losses, grad_norm, copied

    @property
    def is_read(self) -> bool:
        """Whether the numbers are there, and someone has waited for them if they were late."""
        return self._copied is None

    @property
    def is_done(self) -> bool:
        """Whether the device is done."""
        return self._copied is None or bool(self._copied.query())

    def wait(self) -> None:
        """Wait until the numbers are there."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    @property
    def losses(self) -> Tensor:
        """The losses."""
        self.wait()
        return self._losses

    @property
    def grad_norm(self) -> Optional[Tensor]:
        """The norms of the gradients."""
        self.wait()
        return self._grad_norm


@dataclass
class EngineState:
    """State of a training, by hub name so that any engine can load it."""

    #: Hub name -> tensor.
    weights: Dict[str, Tensor]
    #: Hub name -> slot (`exp_avg`, `exp_avg_sq`, `step`) -> tensor.
    optimizer: Dict[str, Dict[str, Tensor]] = field(default_factory=dict)
    #: The optimizer that the slots belong to; empty for weights only.
    optimizer_kind: str = ""
    #: Numbers for JSON: update count, loss scale.
    scalars: Dict[str, float] = field(default_factory=dict)
    #: The device's random generator, int64; None where dropout is a function of the update.
    rng: Optional[Tensor] = None


class Engine(ABC):
    """Train and score a model on one kind of device; a context manager.

    Attributes
    ----------
    module
        Model, loss and optimizer of the run.
    batch
        Batch arithmetic of the run.
    local_batch
        The part of it that this process reads and computes.
    is_main
        Whether this process writes the run.
    place
        Word for what a stage runs on.
    failed
        Whether the engine was closed because of an error.
    """

    def __init__(self, module: ViTModule, batch: BatchPlan) -> None:
        self.module = module
        self.batch = batch
        self.local_batch = batch
        self.is_main = True
        self.place = "stage"
        self.failed = False
        self.loss_device = torch.device("cpu")  # where the module's buffers are
        self.watch = LoaderWatch()

    def __enter__(self: EngineType) -> EngineType:
        return self

    def __exit__(self, kind: object, error: Optional[BaseException], traceback: object) -> None:
        self.failed = error is not None
        try:
            self.close()
        except RuntimeError as late:
            error = error or late
            if self.watch.dead_worker(late) is None:
                raise
        # torch's handler of SIGCHLD raises it in any line.
        dead_worker = self.watch.dead_worker(error)
        if dead_worker is not None:
            raise dead_worker from error

    @abstractmethod
    def describe(self) -> str:
        """Return a line about the device, the precision and the reason for both."""

    @abstractmethod
    def facts(self) -> Dict[str, Any]:
        """Return what `describe` tells as JSON-able fields.

        `name`, `device` (``"CPU"``, the GPU's name or ``"IPU"``), `precision`, `processes`,
        `replicas`, `stages`.
        """

    @abstractmethod
    def loader(
        self,
        dataset: ChestXrayDataset,
        sampler: Union[TrainingSampler, EvaluationSampler],
        *,
        training: bool,
    ) -> Iterable[Batch]:
        """Return this process's host batches of `dataset` in the order of `sampler`."""

    @abstractmethod
    def compile(self, example: Batch) -> float:
        """Prepare the first step; return the seconds that took."""

    def prepare_scoring(self, dataset: ChestXrayDataset) -> float:
        """Prepare the first `predict`; return the seconds that took, 0 where it takes none.

        All processes must call this together.
        """
        return 0.0

    @abstractmethod
    def train_step(self, batch: Batch, *, lr: float) -> StepOutput:
        """Make the weight updates of one host batch, all with learning rate `lr`.

        `batch` holds a whole number of global batches (this process's part of them) in order.
        """

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """Return the logits of a host batch, float32 ``[B, C]`` on the CPU, padding included."""

    @abstractmethod
    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all processes must call this together."""

    @abstractmethod
    def gather(self, *parts: Tensor) -> Tuple[Tensor, ...]:
        """Concatenate the rows that the processes have of each part."""

    @abstractmethod
    def state_dict(self) -> EngineState:
        """Return copies of the training state on the CPU.

        All processes must call this together; the main process gets the whole state.
        """

    @abstractmethod
    def load_state_dict(self, state: EngineState) -> None:
        """Load the training state.

        Raises
        ------
        CheckpointError
            If it belongs to another model or optimizer.
        """

    @abstractmethod
    def device_stats(self) -> Dict[str, float]:
        """Return statistics of the device by tag, such as peak memory in GiB (2**30 bytes)."""

    @abstractmethod
    def close(self) -> None:
        """Release the device."""

    def activation_ranges(self, images: Tensor) -> List[StageRange]:
        """Return the range of each stage's output for images, uint8 ``[B, 1, H, W]``.

        All processes must call this together. Empty where the device cannot report it.
        """
        return []

    def predict_dataset(
        self, dataset: ChestXrayDataset, *, stops: Optional[Callable[[], bool]] = None
    ) -> Tuple[Tensor, Tensor]:
        """Score every image of a split exactly once.

        `stops` is asked after each host batch; Interrupted is raised in all processes if it is true
        in one.

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
            if stops is not None and self.any_process(stops()):
                raise Interrupted
        parts = (torch.cat(part) for part in (logits, labels, indices))
        all_logits, all_labels, scored = self.gather(*parts)
        order = scored.argsort()
        assert torch.equal(scored[order], torch.arange(len(dataset))), "each image once"
        return all_logits[order], all_labels[order]

    def loss(self, logits: Tensor, labels: Tensor) -> float:
        """Return the module's loss over a whole split, given float32 ``[N, C]`` on the CPU."""
        was_training, self.module.training = self.module.training, False
        try:
            with torch.no_grad():
                device = self.loss_device
                return float(self.module.loss(logits.to(device), labels.to(device)))
        finally:
            self.module.training = was_training


def check_batch(batch: Batch, unit: int) -> None:
    """Assert the layout of a batch whose size is a multiple of `unit`."""
    assert batch.images.dtype == torch.uint8, batch.images.dtype
    assert batch.images.dim() == 4 and batch.images.shape[1] == 1, batch.images.shape
    size = len(batch.images)
    assert size > 0 and size % unit == 0, f"{size} samples are no multiple of {unit}"
    assert len(batch.labels) == len(batch.indices) == size


def process_peak_gib() -> float:
    """Return the peak memory of this process in GiB (2**30 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
