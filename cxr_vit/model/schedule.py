"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from cxr_vit.config.schema import Config


@dataclass(frozen=True)
class LearningRate:
    """Learning rate of each step: linear warm-up from 0, then decay to `least` after the last step.

    With `least` 0 it equals `get_cosine_schedule_with_warmup` of `transformers.optimization` and
    its linear and constant variants: with a warm-up, step 0 has rate 0. The cosine with a `least`
    is that of MAE (He et al. 2022, its `lr_sched.py`).
    """

    peak: float
    name: str
    warmup_steps: int
    total_steps: int
    least: float = 0.0

    @classmethod
    def from_config(cls, config: Config, total_steps: int) -> LearningRate:
        """Convert the warm-up to steps; a ratio is rounded up as transformers does."""
        schedule, warmup = config.schedule, config.schedule.warmup_steps
        if schedule.warmup_epochs is not None:
            # In the decimals that were given: 5 of 75 epochs are exactly a fifteenth of the steps.
            part = Fraction(str(schedule.warmup_epochs)) / Fraction(str(config.train.epochs))
            warmup = math.ceil(part * total_steps)
        elif warmup is None:
            assert schedule.warmup_ratio is not None
            warmup = math.ceil(schedule.warmup_ratio * total_steps)
        return cls(config.peak_lr, schedule.name, warmup, total_steps, schedule.min_lr)

    def at(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.name == "constant":
            return self.peak
        remaining = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / remaining)
        fall = self.peak - self.least
        if self.name == "linear":
            return self.least + fall * (1.0 - progress)
        return self.least + fall * 0.5 * (1.0 + math.cos(math.pi * progress))
