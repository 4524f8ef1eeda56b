"""Durations in steps, and the learning rate as a function of the step."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Optional

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import ScheduleSection, TrainSection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Durations:
    """Durations of a run in steps (weight updates)."""

    steps_per_epoch: int
    total_steps: int
    eval_every: int
    checkpoint_every: int

    @classmethod
    def from_section(cls, train: TrainSection, batch: BatchPlan, num_samples: int) -> Durations:
        """Convert epochs to steps.

        An epoch is the number of whole global batches in the `num_samples` training samples, at
        least one. The run is a whole number of host calls.
        """
        per_epoch = max(1, num_samples // batch.global_batch_size)
        if num_samples < batch.global_batch_size:
            logger.warning(
                "the training split has %d images, fewer than the global batch of %d: a step uses"
                " images more than once",
                num_samples,
                batch.global_batch_size,
            )
        total = train.steps or _steps(train.epochs, per_epoch)
        iterations = batch.device_iterations
        return cls(
            steps_per_epoch=per_epoch,
            total_steps=max(1, total // iterations) * iterations,
            eval_every=train.eval_every_steps or _steps(train.eval_every_epochs, per_epoch),
            checkpoint_every=train.checkpoint_every_steps
            or _steps(train.checkpoint_every_epochs, per_epoch),
        )

    def describe(self, first_step: int = 0) -> str:
        """Describe the run in one line."""
        start = f"from step {first_step} on, " if first_step else ""
        return (
            f"{start}{self.total_steps} steps, {self.steps_per_epoch} per epoch; validation every"
            f" {self.eval_every}, checkpoint every {self.checkpoint_every} steps"
        )


def _steps(epochs: Optional[float], steps_per_epoch: int) -> int:
    assert epochs is not None
    return max(1, round(epochs * steps_per_epoch))


@dataclass(frozen=True)
class LearningRate:
    """Learning rate of each step: linear warm-up from 0, then decay to 0.

    Equal to `get_cosine_schedule_with_warmup` of `transformers.optimization` and its linear and
    constant variants: with a warm-up, step 0 has rate 0.
    """

    peak: float
    name: str
    warmup_steps: int
    total_steps: int

    @classmethod
    def from_section(
        cls, schedule: ScheduleSection, *, peak: float, total_steps: int
    ) -> LearningRate:
        """Convert the warm-up ratio to steps, rounded up as transformers does."""
        warmup = schedule.warmup_steps
        if warmup is None:
            assert schedule.warmup_ratio is not None
            warmup = math.ceil(schedule.warmup_ratio * total_steps)
        return cls(peak=peak, name=schedule.name, warmup_steps=warmup, total_steps=total_steps)

    def at(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.name == "constant":
            return self.peak
        remaining = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / remaining)
        if self.name == "linear":
            return self.peak * (1.0 - progress)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
