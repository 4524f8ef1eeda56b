"""The training loop, the interface of its callbacks, and stopping on signals.

A run is, in short::

    on_fit_start                # and a validation, if the resumed run missed one
    for each host batch:
        train, on_step_end
        if a validation is due: validate, on_eval_end
        if a checkpoint is due or the score is the best: save
        if a stop was requested: break
    save, on_fit_end            # or on_exception
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from torch import Tensor

from cxr_vit.data.dataset import Batch, ChestXrayDataset
from cxr_vit.data.sampler import TrainingSampler
from cxr_vit.engines.base import Engine, EngineState, StepOutput
from cxr_vit.errors import CheckpointError, NonFiniteLoss
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.training.checkpoint import CheckpointStore, load_checkpoint
from cxr_vit.training.schedule import Durations, LearningRate

logger = logging.getLogger(__name__)

#: The metric that decides which checkpoint is best.
MONITOR = "auroc_macro"

#: Metric name (`auroc_macro`, `auroc/Hernia`) -> value, None where it is undefined.
Scores = Dict[str, Optional[float]]


@dataclass(frozen=True)
class StepEnd:
    """A host batch is done: updates `first_step` to `step` - 1.

    `lr` is their learning rate, `wait_s` the time spent waiting for the data, `seconds` the time
    spent in the engine.
    """

    first_step: int
    step: int
    output: StepOutput
    lr: float
    wait_s: float
    seconds: float


@dataclass(frozen=True)
class EvalEnd:
    """The validation split is scored: logits and labels are float32 ``[N, C]``."""

    step: int
    loss: float
    scores: Scores
    logits: Tensor
    labels: Tensor
    seconds: float


class Callback:
    """Base of callbacks; every hook does nothing.

    A callback observes a run. It may call `request_stop` or `interrupt` of the trainer.
    """

    #: Name of the callback's state in a checkpoint; empty if it has none.
    state_key = ""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Run after compilation, before the first step."""

    def on_step_end(self, trainer: Trainer, event: StepEnd) -> None:
        """Run after each host batch."""

    def on_eval_end(self, trainer: Trainer, event: EvalEnd) -> None:
        """Run after each validation."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Run after the last step, also after a requested stop."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Run if an error ends the run."""

    def state_dict(self) -> Dict[str, Any]:
        """Return the JSON-able state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the state is empty if a checkpoint has none."""


class Trainer:
    """Train the model of an engine; validate and save when due.

    Learning rate and sample order are functions of the step, so the step, the engine's state and
    the callbacks' state are enough to resume a run exactly.

    `callbacks` are called in their order. `score` maps logits and labels, float32 ``[N, C]``, to
    metrics. A checkpoint has `model_files` (name -> text) and `origin`, JSON-able facts about the
    data that must match on resume. `keep_last` checkpoints are kept besides `best`.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        train_data: ChestXrayDataset,
        val_data: ChestXrayDataset,
        durations: Durations,
        learning_rate: LearningRate,
        seed: int,
        callbacks: Sequence[Callback],
        score: Callable[[Tensor, Tensor], Scores],
        checkpoints: CheckpointStore,
        keep_last: int,
        model_files: Dict[str, str],
        origin: Dict[str, Any],
    ) -> None:
        self.engine = engine
        self.train_data = train_data
        self.val_data = val_data
        self.durations = durations
        self.learning_rate = learning_rate
        self.seed = seed
        self.callbacks = list(callbacks)
        keys = [callback.state_key for callback in self.callbacks if callback.state_key]
        assert len(keys) == len(set(keys)), f"two callbacks have the same state_key: {keys}"
        self.score = score
        self.checkpoints = checkpoints
        self.keep_last = keep_last
        self.model_files = model_files
        self.origin = origin

        self.step = 0  # weight updates done
        self.evaluated_step = 0
        self.best_score: Optional[float] = None  # `MONITOR` of the checkpoint `best`
        self.stop_reason: Optional[str] = None
        self.interrupted = False  # whether `interrupt` is the reason
        self.compile_s = 0.0
        self._saved_step = 0
        self._saved_validation = 0
        self._interruption: Optional[str] = None

    def fit(self) -> None:
        """Train from the current step to the last one, or until a stop is requested."""
        try:
            self.compile_s = self.engine.compile(self._example_batch())
            self._notify("on_fit_start")
            if self.validation_is_due:  # the run was stopped between a step and its validation
                self.validate()
            if not self.stop_reason:
                self._train()
            if (self._saved_step, self._saved_validation) != (self.step, self.evaluated_step):
                self.save()
            self._notify("on_fit_end")
        except BaseException as error:
            self._notify("on_exception", error)
            raise

    def _train(self) -> None:
        """Train batch by batch to the last step or a stop; validate and save when due."""
        batches = self.engine.loader(self.train_data, self._sampler(), training=True)
        for batch, wait_s in _timed(batches):
            self._train_step(batch, wait_s)
            if self.checkpoint_is_due and not self.validation_is_due:
                self.save()
            self._stop_if_interrupted()
            if self.validation_is_due:
                self.validate()  # saves if the score is the best or a checkpoint is due
                self._stop_if_interrupted()
            if self.stop_reason:
                break

    def _train_step(self, batch: Batch, wait_s: float) -> None:
        """Do the weight updates of a host batch and notify the callbacks."""
        start = time.perf_counter()
        lr = self.learning_rate.at(self.step)
        output = self.engine.train_step(batch, lr=lr)
        seconds = time.perf_counter() - start
        first, self.step = self.step, self.step + len(output.losses)
        self._notify("on_step_end", StepEnd(first, self.step, output, lr, wait_s, seconds))

    def validate(self) -> None:
        """Score the validation split, notify the callbacks, and save if best or due."""
        start = time.perf_counter()
        logits, labels = self.engine.predict_dataset(self.val_data)
        loss = float(multi_label_loss(logits, labels))
        seconds = time.perf_counter() - start
        self.evaluated_step = self.step
        scores = self.score(logits, labels)
        self._notify("on_eval_end", EvalEnd(self.step, loss, scores, logits, labels, seconds))
        is_best = self._update_best(scores.get(MONITOR))
        if is_best or self.checkpoint_is_due:
            self.save(is_best=is_best)

    def _update_best(self, score: Optional[float]) -> bool:
        """Return whether the score is the best; as long as none is defined, every one is."""
        if score is None:  # no label of the validation split has both positives and negatives
            effect = "best follows the last one" if self.best_score is None else "best stays"
            logger.warning("val/%s is undefined at step %d: %s", MONITOR, self.step, effect)
        is_best = self.best_score is None or (score is not None and score > self.best_score)
        if is_best:
            self.best_score = score
        return is_best

    def is_due(self, first_step: int, every: int) -> bool:
        """Whether a multiple of `every` lies in the steps since `first_step`; always at the end."""
        return self.step // every > first_step // every or self.is_finished

    @property
    def validation_is_due(self) -> bool:
        """Whether a validation is due since the last one; none is after a requested stop."""
        due = self.is_due(self.evaluated_step, self.durations.eval_every)
        return due and self.evaluated_step < self.step and not self.stop_reason

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether a checkpoint is due since the last one."""
        due = self.is_due(self._saved_step, self.durations.checkpoint_every)
        return due and self._saved_step < self.step

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.durations.total_steps

    @property
    def is_complete(self) -> bool:
        """Whether the last step is done and validated: nothing is left to resume."""
        return self.is_finished and self.evaluated_step == self.step

    def request_stop(self, reason: str) -> None:
        """Stop after the current host batch. Every process must call it."""
        self.stop_reason = self.stop_reason or reason

    def interrupt(self, reason: str) -> None:
        """Stop after the current host batch, to be resumed later.

        Any process may call it at any time, also from a signal handler.
        """
        self._interruption = reason

    def _stop_if_interrupted(self) -> None:
        """Stop if any process was interrupted: all of them must stop at the same step."""
        if not self.stop_reason and self.engine.any_process(self._interruption is not None):
            self.stop_reason = self._interruption or "another process was interrupted"
            self.interrupted = True

    def save(self, *, is_best: bool = False) -> Path:
        """Write a checkpoint of the current step, update the links, and delete old checkpoints.

        Raises NonFiniteLoss and writes nothing if a weight is NaN or infinite.
        """
        state = self.engine.state_dict()
        broken = [name for name, weight in state.weights.items() if not weight.isfinite().all()]
        if broken:
            raise NonFiniteLoss(
                f"{len(broken)} weights are not finite at step {self.step}, first {broken[0]}; they"
                f" are not saved. The last checkpoint is {self.checkpoints.linked('last')}."
            )
        path = self.checkpoints.save(
            self.step,
            state,
            model_files=self.model_files,
            trainer_state={
                **self._resume_facts(),
                "evaluated_step": self.evaluated_step,
                "best_score": self.best_score,
                "callbacks": {
                    callback.state_key: callback.state_dict()
                    for callback in self.callbacks
                    if callback.state_key
                },
            },
        )
        self._saved_step, self._saved_validation = self.step, self.evaluated_step
        if is_best:
            self.checkpoints.link("best", path)
        self.checkpoints.prune(self.keep_last)
        return path

    def resume(self, checkpoint: Path, *, weights_only: bool = False) -> None:
        """Restore the state of a checkpoint.

        `weights_only` leaves out the state of the optimizer and of the device's random generator.
        Raises CheckpointError if the checkpoint is damaged, of another model, of other data, or
        past the end of this run.
        """
        state, trainer_state = load_checkpoint(checkpoint)
        changed = [
            fact for fact, value in self._resume_facts().items() if trainer_state.get(fact) != value
        ]
        if changed:
            raise CheckpointError(
                f"{checkpoint} cannot be resumed with another {', '.join(changed)}: scores would"
                " not compare, and images it was trained on could be scored. Restore the old"
                f" setting, or start a new run from its weights: model.name={checkpoint}"
            )
        step = trainer_state["step"]
        if step > self.durations.total_steps:
            raise CheckpointError(
                f"{checkpoint} is at step {step}, past this run's {self.durations.total_steps}"
                " steps. Raise train.epochs or train.steps."
            )
        if weights_only:
            state = EngineState(state.weights, scalars={"updates": float(step)})
        self.engine.load_state_dict(state)
        self.step = self._saved_step = step
        self.evaluated_step = self._saved_validation = trainer_state["evaluated_step"]
        self.best_score = trainer_state["best_score"]
        for callback in self.callbacks:
            callback.load_state_dict(trainer_state["callbacks"].get(callback.state_key, {}))

    def _resume_facts(self) -> Dict[str, Any]:
        """Return the facts that must match on resume."""
        global_batch_size = self.engine.batch.global_batch_size
        return {**self.origin, "seed": self.seed, "global_batch_size": global_batch_size}

    def describe_end(self) -> str:
        """Describe in one line how the run ended and where its best checkpoint is."""
        best = "best" if self.checkpoints.linked("best") else "last"
        ending = "finished"
        if not self.is_complete:
            ending = f"stopped at step {self.step}: {self.stop_reason}"
        return f"{ending}; {best} checkpoint: {self.checkpoints.folder / best}"

    def rows(self, step: int) -> List[int]:
        """Return the rows of the training split that an update uses, over all processes."""
        rows: List[int] = (self._sampler().draws(step) % len(self.train_data)).tolist()
        return rows

    def _sampler(self) -> TrainingSampler:
        return TrainingSampler(
            len(self.train_data),
            global_batch_size=self.engine.batch.global_batch_size,
            device_iterations=self.engine.batch.device_iterations,
            seed=self.seed,
            start_step=self.step,
            total_steps=self.durations.total_steps,
        )

    def _example_batch(self) -> Batch:
        return Batch.zeros(
            self.engine.local_batch.host_batch_size,
            image_size=self.train_data.image_size,
            num_classes=self.train_data.num_classes,
        )

    def _notify(self, hook: str, *event: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *event)


def _timed(batches: Iterable[Batch]) -> Iterator[Tuple[Batch, float]]:
    """Yield each batch with the seconds spent waiting for it."""
    start = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - start
        start = time.perf_counter()


class StopOnSignal:
    """Context in which the first SIGINT or SIGTERM calls `interrupt` with the reason.

    `quiet` prints nothing and ignores further signals, for one of several processes: torchrun
    signals all remaining processes when one ends, and kills them later.
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
        text = f"\n{name}: saving after this step; a second signal ends the run at once\n"
        os.write(sys.stderr.fileno(), text.encode())  # a handler may not use a buffered stream

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
