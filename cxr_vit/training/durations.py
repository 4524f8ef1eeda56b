"""Durations of a run in steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Optional

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import TrainSection

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
