"""What the commands add to a run: the plan of a run on IPUs, and a line about the engine."""

from __future__ import annotations

from typing import Any

from cxr_vit.model.module import ViTModule
from cxr_vit.planner.estimate import plan_of_run
from cxr_vit.training.callback import Callback
from cxr_vit.training.callbacks import draws_figures


class PlanFigures(Callback):
    """Log the predicted timeline and memory of a new run on IPUs."""

    def on_fit_start(self, trainer: Any, module: ViTModule) -> None:
        """Draw the plan, if the planner knows the model's shape."""
        if not (trainer.choice.is_ipu and draws_figures(trainer)) or trainer.global_step:
            return
        from cxr_vit.planner.figures import CARD, memory_figure, timeline_figure  # matplotlib

        plan = plan_of_run(trainer.config)
        if plan is not None:
            trainer.log_figures(
                {
                    "plan/timeline": timeline_figure(plan, CARD),
                    "plan/memory": memory_figure(plan, CARD),
                }
            )


class DescribeEngine(Callback):
    """Print which engine scores, and why."""

    def setup(self, trainer: Any, module: ViTModule, stage: str) -> None:
        """Print the line."""
        if trainer.is_global_zero:
            print(trainer.engine.describe(), flush=True)
