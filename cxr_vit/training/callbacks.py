"""Built-in callbacks: logging, early stopping, and the progress display."""

from __future__ import annotations

import gc
import logging
import math
import time
from datetime import timedelta
from typing import Any, Dict, List, Mapping, Optional, Sequence

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from rich.console import Console
from rich.progress import Progress, TaskID

from cxr_vit.config.fields import less_is_better
from cxr_vit.config.schema import Config, TrainSection
from cxr_vit.console import progress_bar
from cxr_vit.data.dataset import Batch
from cxr_vit.errors import ConfigError
from cxr_vit.evaluation.metrics import EvalOutputs
from cxr_vit.model.module import ViTModule
from cxr_vit.training.callback import Callback, TrainOutputs
from cxr_vit.training.loggers import Logger
from cxr_vit.training.nonfinite import NonFiniteGuard

logger = logging.getLogger(__name__)

#: The score that decides which checkpoint is best, by default.
MONITOR: str = TrainSection().monitor


def default_callbacks(
    config: Config, given: Sequence[Callback], *, is_main: bool
) -> List[Callback]:
    """Return the built-in callbacks of a run; those of `given` replace their kind."""
    every = config.train.log_every_steps
    built_in: List[Callback] = [
        NonFiniteGuard(skips=config.train.on_nonfinite == "skip_update"),
        EarlyStopping(f"val/{config.train.monitor}", patience=config.train.early_stopping_patience),
        MetricsLogging(every=every),
    ]
    if config.engine.synthetic_data:
        del built_in[0]  # the losses are meaningless
    if is_main:
        built_in += [FigureLogging(), ProgressDisplay(every=every)]
    return [
        callback
        for callback in built_in
        if not any(isinstance(other, type(callback)) for other in given)
    ]


class EarlyStopping(Callback):
    """Stop after `patience` validations without a better score; None never stops.

    `monitor` is a tag of `trainer.callback_metrics`. `mode` is ``"max"`` or ``"min"``, by default
    ``"min"`` for a loss. A validation whose score is undefined does not count.
    """

    state_key = "early_stopping"

    def __init__(
        self,
        monitor: str = f"val/{MONITOR}",
        *,
        patience: Optional[int] = 3,
        mode: Optional[str] = None,
    ) -> None:
        mode = mode or ("min" if less_is_better(monitor) else "max")
        if mode not in ("max", "min"):
            raise ConfigError(f"EarlyStopping: mode={mode!r} must be 'max' or 'min'.")
        self.patience = patience
        self.monitor = monitor
        self.sign = 1.0 if mode == "max" else -1.0
        self.best: Optional[float] = None
        self.since_best = 0
        self._has_warned = False

    def setup(self, trainer: Any, module: ViTModule, stage: str) -> None:
        """Begin again in a new run."""
        if stage == "fit":
            self.best, self.since_best, self._has_warned = None, 0, False

    def on_validation_end(self, trainer: Any, module: ViTModule) -> None:
        """Count the validations since the best score."""
        if not trainer.is_fitting:
            return
        if self.monitor not in trainer.callback_metrics and self.patience is not None:
            known = ", ".join(trainer.validation_outputs.tagged())
            raise ConfigError(f"EarlyStopping: no metric {self.monitor!r}. There are: {known}.")
        score = trainer.callback_metrics.get(self.monitor)
        if score is None or not math.isfinite(score):
            if self.monitor in trainer.callback_metrics:
                self._warn_of_undefined()
            return
        if self.best is None or self.sign * (score - self.best) > 0:
            self.best, self.since_best = score, 0
            return
        self.since_best += 1
        if self.patience is not None and self.since_best >= self.patience:
            trainer.request_stop(
                f"early stopping: {self.since_best} validations without a better"
                f" {self.monitor} than {self.best:.4f}"
            )

    def _warn_of_undefined(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        why = effect = ""
        if "auroc" in self.monitor:
            why = ": no label has both positive and negative images in the validation split"
        if self.patience is not None:
            effect = ". Such validations do not count for early stopping"
        logger.warning("%s is undefined%s%s", self.monitor, why, effect)

    def state_dict(self) -> Dict[str, Any]:
        """Return the best score, None before the first one, of which score, and the count."""
        return {"monitor": self.monitor, "best": self.best, "since_best": self.since_best}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore the best score and the count, unless they are of another score."""
        state = _Patience.model_validate(state_dict)
        if state.monitor in (None, self.monitor):
            self.best, self.since_best = state.best, state.since_best


class _Patience(BaseModel):
    """State of `EarlyStopping`."""

    model_config = ConfigDict(strict=True)

    monitor: Optional[str] = None  # earlier versions do not say
    best: Optional[float]
    since_best: int = Field(ge=0)


class MetricsLogging(Callback):
    """Log the mean over the steps since the last event, after `every` steps, and the scores."""

    state_key = "metrics"

    def __init__(self, *, every: int) -> None:
        self.every = every
        self._window = Window()

    def setup(self, trainer: Any, module: ViTModule, stage: str) -> None:
        """Begin again in a new run."""
        self._window = Window()

    def on_fit_start(self, trainer: Any, module: ViTModule) -> None:
        """Log the compile time."""
        trainer.log_metrics({"perf/compile_s": trainer.compile_s})

    def on_train_batch_end(
        self,
        trainer: Any,
        module: ViTModule,
        outputs: TrainOutputs,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Log when due."""
        self._window.add(outputs)
        if trainer.is_due(outputs.first_step, self.every):
            self._window.read()
            trainer.log_metrics({**self._window.summary(), **trainer.engine.device_stats()})
            self._window = Window()

    def on_validation_end(self, trainer: Any, module: ViTModule) -> None:
        """Log the scores."""
        trainer.log_metrics(trainer.validation_outputs.tagged())

    def state_dict(self) -> Dict[str, Any]:
        """Return the numbers since the last event, so that a resumed run logs the same."""
        self._window.read()
        return self._window.model_dump()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore the numbers since the last event."""
        self._window = Window.model_validate(state_dict)


def draws_figures(trainer: Any) -> bool:
    """Whether a logger shows the figures of the current fit, which take a second to draw."""
    return bool(trainer.is_logging) and any(
        type(log).log_figures is not Logger.log_figures for log in trainer.loggers
    )


class FigureLogging(Callback):
    """Log training images at the start of a run, and ROC curves after each validation."""

    def on_fit_start(self, trainer: Any, module: ViTModule) -> None:
        """Log images as the model sees them, in a new run."""
        from cxr_vit.evaluation.figures import image_grid

        if draws_figures(trainer) and not trainer.global_step:
            trainer.log_figures({"train/images": image_grid(trainer.train_data, module.names)})

    def on_validation_end(self, trainer: Any, module: ViTModule) -> None:
        """Log the ROC curves."""
        from cxr_vit.evaluation.figures import roc_overview

        if draws_figures(trainer):
            scored: EvalOutputs = trainer.validation_outputs
            figure = roc_overview(scored.logits, scored.labels, module.names)
            trainer.log_figures({"val/roc": figure})
            del figure
            gc.collect()  # a figure is a circle of references, which would stay for long


class ProgressDisplay(Callback):
    """Show a progress bar on a terminal, elsewhere a line after `every` steps.

    The default console is stderr, so that stdout has only results.
    """

    def __init__(self, *, every: int, console: Optional[Console] = None) -> None:
        self.every = every
        # In a notebook, each line would be an output of its own.
        self.console = console or Console(stderr=True, force_jupyter=False)
        self._bar: Optional[Progress] = None
        self._task = TaskID(0)
        self._window = Window()
        self._started = 0.0
        self._start_step = 0

    def on_fit_start(self, trainer: Any, module: ViTModule) -> None:
        """Start the bar."""
        self._window = Window()
        self._started, self._start_step = time.perf_counter(), trainer.global_step
        if self.console.is_terminal:
            self._bar = progress_bar(self.console, "step")
            self._bar.start()
            total = trainer.durations.total_steps
            self._task = self._bar.add_task("", total=total, completed=trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Any,
        module: ViTModule,
        outputs: TrainOutputs,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Update the bar, or print a line when due."""
        self._window.add(outputs)
        is_due = trainer.is_due(outputs.first_step, self.every)
        if is_due:
            self._window.read()
        if self._bar is not None:
            self._bar.update(self._task, completed=outputs.step)
            if self._window.num_samples:  # on a GPU, those of the step before
                self._bar.update(self._task, description=_short(self._window.summary()))
        elif is_due:
            total = trainer.durations.total_steps
            per_step_s = (time.perf_counter() - self._started) / (outputs.step - self._start_step)
            self._print(
                f"step {outputs.step}/{total}  {_short(self._window.summary())}"
                f"  eta {timedelta(seconds=round(per_step_s * (total - outputs.step)))}"
            )
        if is_due:
            self._window = Window()

    def on_validation_end(self, trainer: Any, module: ViTModule) -> None:
        """Print a line with the scores."""
        scored: EvalOutputs = trainer.validation_outputs
        self._print(
            f"step {scored.step}  val loss {scored.loss:.4f}  {_score_text(scored)}"
            f"  {len(scored.logits)} images in {scored.seconds:.1f} s"
        )

    def on_fit_end(self, trainer: Any, module: ViTModule) -> None:
        """Stop the bar."""
        self._stop()

    def on_exception(self, trainer: Any, module: ViTModule, exception: BaseException) -> None:
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


def _score_text(scored: EvalOutputs) -> str:
    score, defined = scored.scores.get(MONITOR), scored.scores.get("auroc_defined")
    text = "undefined" if score is None else f"{score:.4f}"
    if defined is None:  # metrics of a subclass
        return f"{MONITOR} {text}"
    return f"macro AUROC {text} ({defined:.0f} of {scored.scores['num_findings']:.0f} findings)"


class Window(BaseModel):
    """Running sums over host batches, without the batches themselves."""

    model_config = ConfigDict(strict=True)

    losses: List[float] = []
    num_samples: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    lr: float = 0.0
    grad_norm: Optional[float] = None
    _unread: List[TrainOutputs] = PrivateAttr(default_factory=list)

    def add(self, outputs: TrainOutputs) -> None:
        """Add a host batch as soon as its numbers are there."""
        self._unread.append(outputs)
        while self._unread and self._unread[0].output.is_read:
            self._add(self._unread.pop(0))

    def read(self) -> None:
        """Wait for the host batches that were added."""
        while self._unread:
            self._add(self._unread.pop(0))

    def _add(self, outputs: TrainOutputs) -> None:
        """Add what was read. The losses of updates that were left out are not finite."""
        self.losses += filter(math.isfinite, outputs.losses.tolist())
        self.num_samples += outputs.num_samples
        self.seconds += outputs.seconds
        self.wait_s += outputs.wait_s
        self.lr = outputs.lr
        norm = outputs.grad_norm
        self.grad_norm = None if norm is None else float(norm[-1])

    def summary(self) -> Dict[str, float]:
        """Return the metrics of the window.

        `train/lr` and `train/grad_norm` are the values of the last update. The speed includes the
        loader, but neither compilation nor validation.
        """
        total_s = self.seconds + self.wait_s
        values = {
            "train/loss": math.fsum(self.losses) / len(self.losses) if self.losses else math.nan,
            "train/lr": self.lr,
            "perf/samples_per_s": self.num_samples / total_s,
            "perf/data_wait_pct": 100.0 * self.wait_s / total_s,
        }
        if self.grad_norm is not None:
            values["train/grad_norm"] = self.grad_norm
        return values
