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
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor

from cxr_vit.data.dataset import Batch, ChestXrayDataset
from cxr_vit.data.sampler import TrainingSampler
from cxr_vit.engines.base import Engine, EngineState, StepOutput
from cxr_vit.errors import CheckpointError, NonFiniteLoss
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.training.checkpoint import CheckpointStore, load_checkpoint
from cxr_vit.training.schedule import Durations, LearningRate

__all__ = [
    "Callback",
    "Checkpointing",
    "EarlyStopping",
    "EvalEnd",
    "NonFiniteGuard",
    "Scores",
    "StepEnd",
    "StopOnSignal",
    "Trainer",
]


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
        """Raise NonFiniteLoss naming the step and its images."""
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
        images = ", ".join(self.image_names[row] for row in rows[:16])
        more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
        last = trainer.store.linked("last")
        saved = f"The last checkpoint is {last}." if last else "No checkpoint was written yet."
        return (
            f"the {what} is {value} at step {event.first_step + update} (lr {event.lr:.3g}),"
            f" images: {images}{more}. Lower optim.lr, set optim.max_grad_norm=1.0, or use"
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
        if score is None:  # no label of the validation split has both kinds of images
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


#: Metric name (`auroc_macro`, `auroc/Hernia`) -> value, None where it is undefined.
Scores = Dict[str, Optional[float]]


@dataclass
class Trainer:
    """Trains an engine's model, scores it on validation when due, and tells the callbacks.

    Parameters
    ----------
    engine
        Does the weight updates.
    train, val
        The splits.
    durations, learning_rate
        Lengths in steps, and the rate of each step.
    seed
        Seed of the sample order.
    callbacks
        Told in this order; one that saves should come last, so that it saves the others' state.
    score
        Logits and labels, float32 ``[N, C]`` -> metrics of a whole split.
    store
        Where checkpoints go.
    model_files
        File name -> text that every checkpoint carries beside its weights.
    origin
        JSON-able facts about the data that every checkpoint carries; a resumed run must share
        them, the seed and the global batch.
    """

    engine: Engine
    train: ChestXrayDataset
    val: ChestXrayDataset
    durations: Durations
    learning_rate: LearningRate
    seed: int
    callbacks: Sequence[Callback]
    score: Callable[[Tensor, Tensor], Scores]
    store: CheckpointStore
    model_files: Dict[str, str]
    origin: Dict[str, Any]
    step: int = 0
    evaluated_step: int = 0
    stop_reason: Optional[str] = None
    interrupted: bool = False
    compile_s: float = 0.0
    _interruption: Optional[str] = None

    def fit(self) -> None:
        """Train from the current step to the last one, or until a stop is requested.

        on_fit_start; then a host batch at a time: on_step_end, on_eval_end, on_checkpoint (each
        when due); at last on_fit_end, or on_exception.
        """
        try:
            self.compile_s = self.engine.compile(self._example())
            self._notify("on_fit_start")
            if self.evaluation_is_due:  # the run was stopped between a step and its validation
                self.evaluate()
            batches = self.engine.loader(self.train, self._sampler(), training=True)
            for batch, wait_s in _timed(batches):
                start = time.perf_counter()
                lr = self.learning_rate.at(self.step)
                output = self.engine.train_step(batch, lr=lr)
                seconds = time.perf_counter() - start
                first, self.step = self.step, self.step + len(output.losses)
                event = StepEnd(first, self.step, output, lr, wait_s, seconds)
                self._notify("on_step_end", event)
                self._heed_interruption()
                if self.evaluation_is_due:
                    self.evaluate()
                    self._heed_interruption()
                if self.stop_reason:
                    break
            self._notify("on_fit_end")
        except BaseException as error:
            self._notify("on_exception", error)
            raise

    def evaluate(self) -> EvalEnd:
        """Score the whole validation split and tell the callbacks."""
        start = time.perf_counter()
        logits, labels = self.engine.predict_dataset(self.val)
        loss = float(multi_label_loss(logits, labels))
        seconds = time.perf_counter() - start
        self.evaluated_step = self.step
        event = EvalEnd(self.step, loss, self.score(logits, labels), logits, labels, seconds)
        self._notify("on_eval_end", event)
        return event

    def is_due(self, first_step: int, every: int) -> bool:
        """Whether the steps since `first_step` reached a multiple of `every`, or the end."""
        reached = self.step // every > first_step // every
        return reached or self.is_finished

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.durations.total_steps

    @property
    def is_complete(self) -> bool:
        """Whether the last step is done and validated: nothing is left to resume."""
        return self.is_finished and self.evaluated_step == self.step

    @property
    def evaluation_is_due(self) -> bool:
        """Whether a multiple of the interval, or the end, was reached since the last validation."""
        every = self.durations.eval_every
        reached = self.step // every > self.evaluated_step // every or self.is_finished
        return reached and self.evaluated_step < self.step and not self.stop_reason

    def request_stop(self, reason: str) -> None:
        """End the run after the current host batch; every process must ask for it."""
        self.stop_reason = self.stop_reason or reason

    def interrupt(self, reason: str) -> None:
        """End the run after the current host batch, to be resumed; any process may ask for it.

        It may do so at any moment, from a signal's handler.
        """
        self._interruption = reason

    def _heed_interruption(self) -> None:
        """Stop if any process was asked to: all must know before any of them stops."""
        if not self.stop_reason and self.engine.agree(self._interruption is not None):
            self.stop_reason = self._interruption or "another process was told to stop"
            self.interrupted = True

    def save(self) -> Path:
        """Write a checkpoint of the current step and tell the callbacks."""
        state = self.engine.state_dict()
        broken = [name for name, weight in state.weights.items() if not weight.isfinite().all()]
        if broken:
            raise NonFiniteLoss(
                f"{len(broken)} weights are not finite at step {self.step}, first {broken[0]}; they"
                f" are not saved. The last checkpoint is {self.store.linked('last')}."
            )
        path = self.store.save(
            self.step,
            state,
            model_files=self.model_files,
            trainer_state={
                **self._facts(),
                "evaluated_step": self.evaluated_step,
                "callbacks": {
                    type(callback).__name__: callback.state_dict() for callback in self.callbacks
                },
            },
        )
        self._notify("on_checkpoint", path)
        return path

    def resume(self, checkpoint: Path, *, weights_only: bool = False) -> None:
        """Go on from a checkpoint.

        Parameters
        ----------
        checkpoint
            Its folder.
        weights_only
            Start the optimizer and the device's random generator anew.

        Raises
        ------
        CheckpointError
            If it is damaged, of another model, of other data, or past the end of this run.
        """
        state, trainer_state = load_checkpoint(checkpoint)
        changed = [
            fact for fact, value in self._facts().items() if trainer_state.get(fact) != value
        ]
        if changed:
            raise CheckpointError(
                f"{checkpoint} cannot be resumed with another {', '.join(changed)}: scores would"
                " not compare, and images it was trained on could be scored. Leave that as it was,"
                f" or start a new run from its weights: model.name={checkpoint}"
            )
        if trainer_state["step"] > self.durations.total_steps:
            raise CheckpointError(
                f"{checkpoint} is at step {trainer_state['step']}, past this run's"
                f" {self.durations.total_steps} steps. Raise train.epochs or train.steps."
            )
        if weights_only:
            state = EngineState(state.weights, scalars={"updates": float(trainer_state["step"])})
        self.engine.load_state_dict(state)
        self.step = trainer_state["step"]
        self.evaluated_step = trainer_state["evaluated_step"]
        for callback in self.callbacks:
            callback.load_state_dict(trainer_state["callbacks"].get(type(callback).__name__, {}))

    def describe_end(self) -> str:
        """Say in a line how the run ended and where its best checkpoint is."""
        best = self.store.linked("best")
        where = self.store.folder / ("best" if best else "last")
        ending = "finished"
        if not self.is_complete:
            ending = f"stopped at step {self.step}: {self.stop_reason}"
        return f"{ending}; {'best' if best else 'last'} checkpoint: {where}"

    def _facts(self) -> Dict[str, Any]:
        """Return what the order of the samples and the meaning of the scores hang on."""
        global_batch_size = self.engine.batch.global_batch_size
        return {**self.origin, "seed": self.seed, "global_batch_size": global_batch_size}

    def rows(self, step: int) -> List[int]:
        """Return the rows of the training split that an update uses, in all processes together."""
        rows: List[int] = (self._sampler().draws(step) % len(self.train)).tolist()
        return rows

    def _sampler(self) -> TrainingSampler:
        return TrainingSampler(
            len(self.train),
            global_batch_size=self.engine.batch.global_batch_size,
            device_iterations=self.engine.batch.device_iterations,
            seed=self.seed,
            start_step=self.step,
            total_steps=self.durations.total_steps,
        )

    def _example(self) -> Batch:
        return Batch.zeros(
            self.engine.local_batch.host_batch_size,
            image_size=self.train.image_size,
            num_classes=self.train.num_classes,
        )

    def _notify(self, hook: str, *event: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *event)


def _timed(batches: Iterable[Batch]) -> Iterator[Tuple[Batch, float]]:
    """Pass batches on, each with the seconds it was waited for: the one place that measures it."""
    start = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - start
        start = time.perf_counter()


class StopOnSignal:
    """A context in which the first SIGINT or SIGTERM calls `interrupt`.

    Parameters
    ----------
    interrupt
        Takes the reason in words.
    quiet
        One of several processes: say nothing, and let no further signal end it while it saves.
        torchrun signals all that are left as soon as one has ended, and kills them in the end.
    """

    def __init__(self, interrupt: Callable[[str], None], *, quiet: bool = False) -> None:
        self.interrupt = interrupt
        self.quiet = quiet
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        name = signal.Signals(number).name
        self.interrupt(f"{name} received")
        if self.quiet:
            return
        self._restore()
        text = f"\n{name}: saving after this step; once more ends the run at once\n"
        os.write(sys.stderr.fileno(), text.encode())  # a handler may not use a buffered stream

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
