"""Callbacks: early stopping, a check for NaN, and the progress display."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any, Dict, Mapping, Optional

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from cxr_vit.console import progress_bar
from cxr_vit.errors import NonFiniteLoss
from cxr_vit.training.loggers import Window
from cxr_vit.training.trainer import MONITOR, Callback, EvalEnd, StepEnd, Trainer

#: Images that an error message names.
_NAMED_IMAGES = 16


class NonFiniteGuard(Callback):
    """Raise at a NaN or infinite loss or gradient norm.

    Must be the first callback, so that the others do not record such a step.
    """

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """Raise NonFiniteLoss with the step and the names of its images."""
        values = {"loss": event.output.losses}
        if event.output.grad_norm is not None:
            values["gradient norm"] = event.output.grad_norm
        for what, value in values.items():
            bad = (~torch.isfinite(value)).nonzero().flatten().tolist()
            if bad:
                raise NonFiniteLoss(
                    f"the {what} is {float(value[bad[0]])} at step {event.first_step + bad[0]}"
                    f" (lr {event.lr:.3g}), {_advice(trainer, event.first_step + bad[0])}"
                )


def _advice(trainer: Trainer, step: int) -> str:
    rows = trainer.rows(step)
    names = trainer.train_data.image_names
    images = ", ".join(names[row] for row in rows[:_NAMED_IMAGES])
    more = f" and {len(rows) - _NAMED_IMAGES} more" if len(rows) > _NAMED_IMAGES else ""
    last = trainer.checkpoints.linked("last")
    saved = f"The last checkpoint is {last}." if last else "No checkpoint was written yet."
    return (
        f"images: {images}{more}. Lower optim.lr, set optim.max_grad_norm=1.0, or use"
        f" engine.precision=fp32. {saved}"
    )


class EarlyStopping(Callback):
    """Request a stop after `patience` validations without a better score; None never stops."""

    state_key = "early_stopping"

    def __init__(self, patience: Optional[int]) -> None:
        self.patience = patience
        self.best = -math.inf
        self.since_best = 0

    def on_eval_end(self, trainer: Trainer, event: EvalEnd) -> None:
        """Count validations since the best score; an undefined score is no improvement."""
        score = event.scores.get(MONITOR)
        if score is not None and score > self.best:
            self.best, self.since_best = score, 0
            return
        self.since_best += 1
        if self.patience is not None and self.since_best >= self.patience:
            trainer.request_stop(
                f"early stopping: {self.since_best} validations without a better {MONITOR}"
                f" than {self.best:.4f}"
            )

    def state_dict(self) -> Dict[str, Any]:
        """Return the best score, None before the first one, and the count."""
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "since_best": self.since_best}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore the best score and the count."""
        best = state.get("best")
        self.best = -math.inf if best is None else best
        self.since_best = state.get("since_best", 0)


class ProgressDisplay(Callback):
    """Show a progress bar on a terminal, elsewhere a line after `every` steps.

    The default console is stderr, so that stdout has only results.
    """

    def __init__(self, *, every: int, console: Optional[Console] = None) -> None:
        self.every = every
        self.console = console or Console(stderr=True)
        self._bar: Optional[Progress] = None
        self._task = TaskID(0)
        self._window = Window()
        self._started = 0.0
        self._start_step = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the bar."""
        self._started, self._start_step = time.perf_counter(), trainer.step
        if self.console.is_terminal:
            self._bar = progress_bar(self.console, "step")
            self._bar.start()
            total = trainer.durations.total_steps
            self._task = self._bar.add_task("", total=total, completed=trainer.step)

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """Update the bar, or print a line when due."""
        self._window.add(event)
        is_due = trainer.is_due(event.first_step, self.every)
        if self._bar is not None:
            text = _short(self._window.summary())
            self._bar.update(self._task, completed=event.step, description=text)
        elif is_due:
            total = trainer.durations.total_steps
            per_step_s = (time.perf_counter() - self._started) / (event.step - self._start_step)
            self._print(
                f"step {event.step}/{total}  {_short(self._window.summary())}"
                f"  eta {timedelta(seconds=round(per_step_s * (total - event.step)))}"
            )
        if is_due:
            self._window.clear()

    def on_eval_end(self, trainer: Trainer, event: EvalEnd) -> None:
        """Print a line with the scores."""
        score = event.scores.get(MONITOR)
        defined, total = event.scores["auroc_defined"], event.scores["num_findings"]
        text = "undefined" if score is None else f"{score:.4f}"
        self._print(
            f"step {event.step}  val loss {event.loss:.4f}"
            f"  macro AUROC {text} ({defined:.0f} of {total:.0f} findings)"
            f"  {len(event.logits)} images in {event.seconds:.1f} s"
        )

    def on_fit_end(self, trainer: Trainer) -> None:
        """Stop the bar."""
        self._stop()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Stop the bar, so that the error has a line of its own."""
        self._stop()

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _short(values: Mapping[str, float]) -> str:
    return (
        f"loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}"
        f"  {values['perf/samples_per_s']:.0f} samples/s  wait {values['perf/data_wait_pct']:.1f} %"
    )
