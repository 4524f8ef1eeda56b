"""Where the numbers go: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence

from torch import Tensor

from cxr_vit.training.trainer import Callback, EvalEnd, StepEnd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cxr_vit.training.trainer import Trainer

__all__ = ["JsonlLogger", "MetricsLogging", "ScalarLogger", "TensorBoardLogger", "Window"]

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
    """Scalars, the config, figures of the start, ROC curves and hparams for TensorBoard.

    Parameters
    ----------
    folder
        Where the event files go.
    config_text
        The resolved configuration as YAML.
    hparams
        Flat settings for the hparams page.
    figures
        Draws the pictures of the start, by tag.
    roc
        Draws ROC curves from logits and labels, float32 ``[N, C]``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config_text: str,
        hparams: Mapping[str, Any],
        figures: Callable[[], Mapping[str, Figure]],
        roc: Callable[[Tensor, Tensor], Figure],
    ) -> None:
        self.folder = folder
        self.config_text = config_text
        self.hparams = dict(hparams)
        self.figures = figures
        self.roc = roc
        self._writer: Any = None

    def start(self, first_step: int) -> None:
        """Open the event file; in a new run write the config and the figures."""
        from torch.utils.tensorboard import SummaryWriter

        # Also of a run that was begun anew in its folder.
        self._writer = SummaryWriter(str(self.folder), purge_step=first_step + 1)
        if not first_step:
            self._writer.add_text("config", f"```yaml\n{self.config_text}```")
            for tag, figure in self.figures().items():
                self._writer.add_figure(tag, figure)

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
        self._window = Window()
        self._final: Dict[str, Optional[float]] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open the sinks and log the compile time."""
        for sink in self.sinks:
            sink.start(trainer.step)
        self._log(trainer.step, {"perf/compile_s": trainer.compile_s})

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """Log the mean over the steps since the last event."""
        self._window.add(event)
        if trainer.is_due(event.first_step, self.every):
            self._log(event.step, {**self._window.summary(), **trainer.engine.device_stats()})
            self._window.clear()

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

    def state_dict(self) -> Dict[str, Any]:
        """Return what was gathered since the last event, so that a resumed run logs the same."""
        return dict(vars(self._window))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Take up what was gathered."""
        vars(self._window).update(state)

    def _log(self, step: int, values: Scalars) -> None:
        for sink in self.sinks:
            sink.scalars(step, values)

    def _close(self) -> None:
        for sink in self.sinks:
            sink.close(self._final)


class Window:
    """Running sums over host batches; it keeps no batch, whose images would fill the memory."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.losses: List[float] = []
        self.num_samples = 0
        self.seconds = 0.0
        self.wait_s = 0.0
        self.lr = 0.0
        self.grad_norm: Optional[float] = None

    def add(self, event: StepEnd) -> None:
        """Count a host batch in."""
        self.losses += event.output.losses.tolist()
        self.num_samples += event.output.num_samples
        self.seconds += event.seconds
        self.wait_s += event.wait_s
        self.lr = event.lr
        norm = event.output.grad_norm
        self.grad_norm = None if norm is None else float(norm[-1])

    def summary(self) -> Dict[str, float]:
        """Boil it down to loss, rate, gradient norm, speed and share of waiting.

        `train/lr` and `train/grad_norm` are those of the last update counted in. The speed is of
        the device and the loader together, without compilation and validation.
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
