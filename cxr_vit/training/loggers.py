"""Loggers: metrics.jsonl and TensorBoard, and the callback that feeds them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from matplotlib.figure import Figure

from cxr_vit.files import write_text
from cxr_vit.training.trainer import Callback, EvalEnd, StepEnd, Trainer

#: Tag -> value, None where it is undefined.
Scalars = Mapping[str, Optional[float]]
#: Tag -> figure.
Figures = Mapping[str, Figure]

#: Columns of the hparams page; the values are the scalars of these tags.
_HPARAM_SCORES = ("val/auroc_macro", "val/average_precision_macro", "val/loss")


class Logger:
    """Base of loggers; every method does nothing."""

    def start(self, first_step: int) -> None:
        """Open the log; a resumed run begins after `first_step`."""

    def scalars(self, step: int, values: Scalars) -> None:
        """Log scalars."""

    def figures(self, step: int, figures: Figures) -> None:
        """Log figures."""

    def close(self, final: Scalars) -> None:
        """Close the log; `final` are the scores of the last validation."""


class JsonlLogger(Logger):
    """Write one JSON object per event, with flat keys and always with `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, first_step: int) -> None:
        """Drop the events after `first_step`: a resumed run repeats them."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [f"{line}\n" for line in lines if _step_of(line) <= first_step]
            write_text(self.path, "".join(kept))

    def scalars(self, step: int, values: Scalars) -> None:
        """Append an event. The file is closed each time, so that a killed run loses none."""
        event = {"step": step, **{tag: _finite(value) for tag, value in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # the last line of a killed process may be incomplete
        return math.inf


def _finite(value: Optional[float]) -> Optional[float]:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


class TensorBoardLogger(Logger):
    """Write scalars, figures, the configuration and the hparams page for TensorBoard.

    `config_text` is the resolved configuration as YAML, `hparams` its flat settings.
    """

    def __init__(self, folder: Path, *, config_text: str, hparams: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config_text = config_text
        self.hparams = dict(hparams)
        self._writer: Any = None

    def start(self, first_step: int) -> None:
        """Open the event file; in a new run write the configuration."""
        from torch.utils.tensorboard import SummaryWriter

        # Also purges the events of a run that was restarted in its folder.
        self._writer = SummaryWriter(str(self.folder), purge_step=first_step + 1)
        if not first_step:
            self._writer.add_text("config", f"```yaml\n{self.config_text}```")

    def scalars(self, step: int, values: Scalars) -> None:
        """Add the defined values; flushed, so that the curves are live."""
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def figures(self, step: int, figures: Figures) -> None:
        """Add figures."""
        for tag, figure in figures.items():
            self._writer.add_figure(tag, figure, step)

    def close(self, final: Scalars) -> None:
        """Add the hparams page and close the file."""
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        metrics = {tag: value for tag, value in final.items() if tag in _HPARAM_SCORES}
        for page in hparams(self.hparams, metrics):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(page)
        self._writer.close()
        self._writer = None


class MetricsLogging(Callback):
    """Hand the numbers of a run to the loggers after `every` steps, and its figures.

    `start_figures` and `eval_figures` draw those of a new run and of a validation.
    """

    state_key = "metrics"

    def __init__(
        self,
        loggers: Sequence[Logger],
        *,
        every: int,
        start_figures: Callable[[Trainer], Figures] = lambda trainer: {},
        eval_figures: Callable[[EvalEnd], Figures] = lambda event: {},
    ) -> None:
        self.loggers = loggers
        self.every = every
        self.start_figures = start_figures
        self.eval_figures = eval_figures
        self._window = Window()
        self._final: Dict[str, Optional[float]] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open the loggers; log the start figures of a new run and the compile time."""
        for logger in self.loggers:
            logger.start(trainer.step)
        if not trainer.step:
            self._log_figures(trainer.step, self.start_figures(trainer))
        self._log(trainer.step, {"perf/compile_s": trainer.compile_s})

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """Log the mean over the steps since the last event when due."""
        self._window.add(event)
        if trainer.is_due(event.first_step, self.every):
            self._log(event.step, {**self._window.summary(), **trainer.engine.device_stats()})
            self._window.clear()

    def on_eval_end(self, trainer: Trainer, event: EvalEnd) -> None:
        """Log the scores and the figures of a validation."""
        self._final = {f"val/{name}": value for name, value in event.scores.items()}
        self._final["val/loss"] = event.loss
        self._log(event.step, self._final)
        self._log_figures(event.step, self.eval_figures(event))

    def on_fit_end(self, trainer: Trainer) -> None:
        """Close the loggers."""
        self._close()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Close the loggers, so that what was logged is on the disk."""
        self._close()

    def state_dict(self) -> Dict[str, Any]:
        """Return the numbers since the last event, so that a resumed run logs the same."""
        return self._window.state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore the numbers since the last event."""
        self._window.load_state_dict(state)

    def _log(self, step: int, values: Scalars) -> None:
        for logger in self.loggers:
            logger.scalars(step, values)

    def _log_figures(self, step: int, figures: Figures) -> None:
        for logger in self.loggers:
            logger.figures(step, figures)

    def _close(self) -> None:
        for logger in self.loggers:
            logger.close(self._final)


class Window:
    """Running sums over host batches, without the batches themselves."""

    _STATE = ("losses", "num_samples", "seconds", "wait_s", "lr", "grad_norm")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Reset the sums."""
        self.losses: List[float] = []
        self.num_samples = 0
        self.seconds = 0.0
        self.wait_s = 0.0
        self.lr = 0.0
        self.grad_norm: Optional[float] = None

    def add(self, event: StepEnd) -> None:
        """Add a host batch."""
        self.losses += event.output.losses.tolist()
        self.num_samples += event.output.num_samples
        self.seconds += event.seconds
        self.wait_s += event.wait_s
        self.lr = event.lr
        norm = event.output.grad_norm
        self.grad_norm = None if norm is None else float(norm[-1])

    def summary(self) -> Dict[str, float]:
        """Return the metrics of the window.

        `train/lr` and `train/grad_norm` are the values of the last update. The speed includes the
        loader, but neither compilation nor validation.
        """
        total_s = self.seconds + self.wait_s
        values = {
            "train/loss": math.fsum(self.losses) / len(self.losses),
            "train/lr": self.lr,
            "perf/samples_per_s": self.num_samples / total_s,
            "perf/data_wait_pct": 100.0 * self.wait_s / total_s,
        }
        if self.grad_norm is not None:
            values["train/grad_norm"] = self.grad_norm
        return values

    def state_dict(self) -> Dict[str, Any]:
        """Return the sums, JSON-able."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore the sums; an empty state resets them."""
        self.clear()
        for name in self._STATE:
            setattr(self, name, state.get(name, getattr(self, name)))
