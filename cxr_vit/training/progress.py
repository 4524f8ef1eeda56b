"""What a person sees of a run: a progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Mapping, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cxr_vit.training.loggers import Window
from cxr_vit.training.trainer import Callback, EvalEnd, StepEnd

if TYPE_CHECKING:
    from cxr_vit.training.trainer import Trainer

__all__ = ["ProgressDisplay"]


class ProgressDisplay(Callback):
    """A progress bar on a terminal, plain lines elsewhere.

    Parameters
    ----------
    every
        Steps between plain lines.
    console
        Where to; stderr by default, so that stdout stays for results.
    """

    def __init__(self, *, every: int, console: Optional[Console] = None) -> None:
        self.every = every
        self.console = console or Console(stderr=True)
        self._bar: Optional[Progress] = None
        self._task: Any = None
        self._window = Window()
        self._started = time.perf_counter()
        self._start_step = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the bar."""
        self._started, self._start_step = time.perf_counter(), trainer.step
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=trainer.durations.total_steps, completed=trainer.step
            )

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """Move the bar at each step, or write a line when due."""
        self._window.add(event)
        due = trainer.is_due(event.first_step, self.every)
        if self._bar is not None:
            text = _short(self._window.summary())
            self._bar.update(self._task, completed=event.step, description=text)
        elif due:
            self._line(trainer, event.step)
        if due:
            self._window.clear()

    def _line(self, trainer: Trainer, step: int) -> None:
        total = trainer.durations.total_steps
        done, left = step - self._start_step, total - step
        eta_s = (time.perf_counter() - self._started) / done * left
        self._print(
            f"step {step}/{total}  {_short(self._window.summary())}"
            f"  eta {timedelta(seconds=round(eta_s))}"
        )

    def on_eval_end(self, trainer: Trainer, event: EvalEnd) -> None:
        """Write a line with the validation's outcome."""
        score = event.scores.get("auroc_macro")
        defined, total = event.scores["auroc_defined"], event.scores["num_findings"]
        known = "undefined" if score is None else f"{score:.4f}"
        self._print(
            f"step {event.step}  val loss {event.loss:.4f}"
            f"  macro AUROC {known} ({defined:.0f} of {total:.0f} findings)"
            f"  {len(event.logits)} images in {event.seconds:.1f} s"
        )

    def on_fit_end(self, trainer: Trainer) -> None:
        """Stop the bar."""
        self._stop()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Stop the bar, so that the error stands on a line of its own."""
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
