"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cxr_vit.config.schema import ScheduleSection


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
