"""Where the numbers go: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from cxr_vit.training.callbacks import Callback, EvalEnd, StepEnd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cxr_vit.training.trainer import Trainer

__all__ = ["JsonlLogger", "MetricsLogging", "ProgressDisplay", "ScalarLogger", "TensorBoardLogger"]

logger = logging.getLogger(__name__)

#: What the hparams page compares runs by; the values are those of the scalars.
_HPARAM_SCORES = ("val/auroc_macro", "val/average_precision_macro", "val/loss")

Scalars = Mapping[str, Optional[float]]


class ScalarLogger:
    """A sink for scalars; this one does nothing."""

    def start(self, first_step: int) -> None:
        """Begin, or go on after `first_step`."""

    def scalars(self, step: int, values: Scalars) -> None:
        """Take tag -> value, None where undefined."""

    def evaluated(self, event: EvalEnd) -> None:
        """Take a validation's logits and labels, for pictures."""

    def close(self, final: Scalars) -> None:
        """End; `final` are the last validation's scores."""


class JsonlLogger(ScalarLogger):
    """One JSON object an event, flat keys, always with `step`.

    Parameters
    ----------
    path
        The file; a resumed run drops what was logged after its checkpoint and goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, first_step: int) -> None:
        """Keep the events up to `first_step`: those after it will happen again."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= first_step]
        aside = self.path.with_name(f".{self.path.name}.writing")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(self.path)

    def scalars(self, step: int, values: Scalars) -> None:
        """Append an event; opened and closed each time, so that a killed run loses none."""
        event = {"step": step, **{tag: _finite(value) for tag, value in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # the half line of a killed process
        return math.inf


def _finite(value: Optional[float]) -> Optional[float]:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


class TensorBoardLogger(ScalarLogger):
    """Scalars, the config, training films, ROC curves and hparams for TensorBoard.

    Parameters
    ----------
    folder
        Where the event files go.
    config_text
        The resolved configuration as YAML.
    hparams
        Flat settings for the hparams page.
    films
        Draws a grid of training films with their findings.
    roc
        Draws ROC curves from logits and labels, float32 ``[N, C]``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config_text: str,
        hparams: Mapping[str, Any],
        films: Callable[[], Figure],
        roc: Callable[[Tensor, Tensor], Figure],
    ) -> None:
        self.folder = folder
        self.config_text = config_text
        self.hparams = dict(hparams)
        self.films = films
        self.roc = roc
        self._writer: Any = None

    def start(self, first_step: int) -> None:
        """Open the event file; write the config and, in a new run, the films."""
        from torch.utils.tensorboard import SummaryWriter

        purge = {"purge_step": first_step + 1} if first_step else {}
        self._writer = SummaryWriter(str(self.folder), **purge)
        if not first_step:
            self._writer.add_text("config", f"```yaml\n{self.config_text}```")
            self._writer.add_figure("train/films", self.films())

    def scalars(self, step: int, values: Scalars) -> None:
        """Add the defined values; flushed, so that the curves are live."""
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def evaluated(self, event: EvalEnd) -> None:
        """Add the ROC curves."""
        self._writer.add_figure("val/roc", self.roc(event.logits, event.labels), event.step)

    def close(self, final: Scalars) -> None:
        """Add the hparams page, which looks up the last validation's scores, and close the file."""
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        metrics = {tag: value for tag, value in final.items() if tag in _HPARAM_SCORES}
        for page in hparams(self.hparams, metrics):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(page)
        self._writer.close()
        self._writer = None


class MetricsLogging(Callback):
    """Gathers the numbers of a run under design.md's tags and hands them to the sinks.

    Parameters
    ----------
    sinks
        JSONL, TensorBoard.
    every
        Steps between training events.
    """

    def __init__(self, sinks: Sequence[ScalarLogger], *, every: int) -> None:
        self.sinks = sinks
        self.every = every
        self._window: List[StepEnd] = []
        self._final: Dict[str, Optional[float]] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open the sinks and log the compile time."""
        for sink in self.sinks:
            sink.start(trainer.step)
        self._log(trainer.step, {"perf/compile_s": trainer.compile_s})

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """Log the mean over the steps since the last event."""
        self._window.append(event)
        if trainer.is_due(event.first_step, self.every):
            self._log(event.step, {**summary(self._window), **trainer.engine.memory_stats()})
            self._window = []

    def on_eval_end(self, trainer: Trainer, event: EvalEnd) -> None:
        """Log the validation."""
        self._final = {f"val/{name}": value for name, value in event.scores.items()}
        self._final["val/loss"] = event.loss
        self._log(event.step, self._final)
        for sink in self.sinks:
            sink.evaluated(event)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Close the sinks."""
        self._close()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Close the sinks, so that what was logged is on the disk."""
        self._close()

    def _log(self, step: int, values: Scalars) -> None:
        for sink in self.sinks:
            sink.scalars(step, values)

    def _close(self) -> None:
        for sink in self.sinks:
            sink.close(self._final)


def summary(window: Sequence[StepEnd]) -> Dict[str, float]:
    """Boil host batches down to loss, rate, gradient norm, speed and share of waiting.

    The speed is of the device and the loader together, without compilation and validation.
    """
    losses = [float(loss) for event in window for loss in event.output.losses]
    seconds = sum(event.seconds for event in window)
    wait_s = sum(event.wait_s for event in window)
    values = {
        "train/loss": math.fsum(losses) / len(losses),
        "train/lr": window[-1].lr,
        "perf/samples_per_s": sum(event.output.num_samples for event in window)
        / (seconds + wait_s),
        "perf/data_wait_pct": 100.0 * wait_s / (seconds + wait_s),
    }
    norm = window[-1].output.grad_norm
    if norm is not None:
        values["train/grad_norm"] = float(norm[-1])
    return values


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
        self._window: List[StepEnd] = []
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
        self._window.append(event)
        due = trainer.is_due(event.first_step, self.every)
        if self._bar is not None:
            text = _short(summary(self._window))
            self._bar.update(self._task, completed=event.step, description=text)
        elif due:
            self._line(trainer, event.step)
        if due:
            self._window = []

    def _line(self, trainer: Trainer, step: int) -> None:
        total = trainer.durations.total_steps
        done, left = step - self._start_step, total - step
        eta_s = (time.perf_counter() - self._started) / done * left
        self._print(
            f"step {step}/{total}  {_short(summary(self._window))}"
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
            f"  {len(event.logits)} films in {event.seconds:.1f} s"
        )

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Say where a checkpoint is, for those who look closely."""
        logger.debug("checkpoint %s", path)

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
