"""Callbacks: they watch a run, save it, and may ask it to stop; they do not change the training.

on_fit_start
for every host batch:
    on_step_end
    on_eval_end      when a validation was due
    on_checkpoint    when one was written
on_fit_end           or on_exception
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

import torch
from torch import Tensor

from cxr_vit.engines.base import StepOutput
from cxr_vit.errors import NonFiniteLoss

if TYPE_CHECKING:
    from cxr_vit.training.trainer import Trainer

__all__ = ["Callback", "Checkpointing", "EarlyStopping", "EvalEnd", "NonFiniteGuard", "StepEnd"]

logger = logging.getLogger(__name__)

#: The score that tells which checkpoint is best.
MONITOR = "auroc_macro"


@dataclass(frozen=True)
class StepEnd:
    """A host batch is done.

    `first_step` was its first update, `step` counts its updates in; `lr` was its learning rate;
    `wait_s` the wait for its data, `seconds` the engine's time.
    """

    first_step: int
    step: int
    output: StepOutput
    lr: float
    wait_s: float
    seconds: float


@dataclass(frozen=True)
class EvalEnd:
    """The validation split was scored: logits and labels are float32 ``[N, C]``."""

    step: int
    loss: float
    scores: Dict[str, Optional[float]]
    logits: Tensor
    labels: Tensor
    seconds: float


class Callback:
    """Base: every hook does nothing."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first step, after compilation."""

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """After each host batch."""

    def on_eval_end(self, trainer: Trainer, event: EvalEnd) -> None:
        """After each validation."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last step, also after a requested stop."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """When the run ends by an error."""

    def state_dict(self) -> Dict[str, Any]:
        """Return what a resumed run must know, JSON-able."""
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""


class NonFiniteGuard(Callback):
    """Ends the run at a NaN or infinite loss or gradient, before such weights are saved.

    Must be the first callback.

    Parameters
    ----------
    image_names
        File names of the training split, by row.
    """

    def __init__(self, image_names: List[str]) -> None:
        self.image_names = image_names

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """Raise NonFiniteLoss naming the step and its films."""
        values = {"loss": event.output.losses}
        if event.output.grad_norm is not None:
            values["gradient norm"] = event.output.grad_norm
        for what, value in values.items():
            bad = (~torch.isfinite(value)).nonzero().flatten().tolist()
            if bad:
                raise NonFiniteLoss(
                    self._message(trainer, event, bad[0], what, float(value[bad[0]]))
                )

    def _message(
        self, trainer: Trainer, event: StepEnd, update: int, what: str, value: float
    ) -> str:
        rows = trainer.rows(event.first_step + update)
        films = ", ".join(self.image_names[row] for row in rows[:16])
        more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
        last = trainer.store.linked("last")
        saved = f"The last checkpoint is {last}." if last else "No checkpoint was written yet."
        return (
            f"the {what} is {value} at step {event.first_step + update} (lr {event.lr:.3g}),"
            f" films: {films}{more}. Lower optim.lr, set optim.max_grad_norm=1.0, or use"
            f" engine.precision=fp32. {saved}"
        )


class EarlyStopping(Callback):
    """Asks for a stop after `patience` validations without a better score.

    Parameters
    ----------
    patience
        Number of validations; None never stops.
    """

    def __init__(self, patience: Optional[int]) -> None:
        self.patience = patience
        self.best = -math.inf
        self.since_best = 0

    def on_eval_end(self, trainer: Trainer, event: EvalEnd) -> None:
        """Count validations since the best score."""
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
        """Return the best score and the count."""
        return {
            "best": self.best if math.isfinite(self.best) else None,
            "since_best": self.since_best,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Take up the best score and the count."""
        best = state.get("best")
        self.best = -math.inf if best is None else best
        self.since_best = state.get("since_best", 0)


class Checkpointing(Callback):
    """Saves every n steps, at the best validation score and at the end; deletes old ones.

    Must be the last callback, so that a checkpoint holds what the others know of the same event.

    Parameters
    ----------
    every
        Steps between saves.
    keep_last
        Checkpoints kept beside the best.
    """

    def __init__(self, *, every: int, keep_last: int) -> None:
        self.every = every
        self.keep_last = keep_last
        self.best: Optional[float] = None
        self._is_due = False
        self._saved_step = -1

    def on_fit_start(self, trainer: Trainer) -> None:
        """Note where the run begins: a resumed step is saved already."""
        self._saved_step = trainer.step if trainer.step else -1

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """Save when due; where a validation follows, it is saved with its outcome."""
        self._is_due = trainer.is_due(event.first_step, self.every)
        if self._is_due and not trainer.evaluation_is_due:
            self._save(trainer)

    def on_eval_end(self, trainer: Trainer, event: EvalEnd) -> None:
        """Save when due or if the score is the best so far; then point `best` at it."""
        score = event.scores.get(MONITOR)
        if score is None:  # no label of the validation split has both kinds of films
            until = "best follows the last one" if self.best is None else "best stays"
            logger.warning("val/%s is undefined at step %d: %s", MONITOR, event.step, until)
        is_best = self.best is None or (score is not None and score > self.best)
        if is_best:
            self.best = score
        if is_best or self._is_due:
            self._save(trainer, is_best=is_best)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Save the last step if it is not saved yet."""
        if self._saved_step != trainer.step:
            self._save(trainer)

    def _save(self, trainer: Trainer, *, is_best: bool = False) -> None:
        path = trainer.save()
        self._saved_step = trainer.step
        if is_best:
            trainer.store.link("best", path)
        trainer.store.prune(self.keep_last)

    def state_dict(self) -> Dict[str, Any]:
        """Return the best score."""
        return {"best": self.best}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Take up the best score."""
        self.best = state.get("best")
