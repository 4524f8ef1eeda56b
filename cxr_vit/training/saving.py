"""Save the checkpoints of a run: what they hold, which is best, and what to do if saving fails."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

from pydantic import ValidationError
from safetensors import SafetensorError

from cxr_vit.config.fields import less_is_better
from cxr_vit.errors import CheckpointError, NonFiniteLoss
from cxr_vit.evaluation.metrics import EvalOutputs
from cxr_vit.training.callbacks import MONITOR
from cxr_vit.training.checkpoint import RESERVED, check_json, only_warning
from cxr_vit.training.config_checks import refuse_unknown_score

logger = logging.getLogger(__name__)


class Saver:
    """Saves the checkpoints of a trainer's run.

    Attributes
    ----------
    best_score, best_step
        `train.monitor` of the checkpoint `best`, None while undefined, and its step.
    tried_step
        Step of the last checkpoint, also if it could not be written.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._monitor = trainer.config.train.monitor
        self.best_score: Optional[float] = None
        self.best_step: Optional[int] = None
        self.tried_step = 0
        self._tried_validation = 0
        self._error: Optional[str] = None
        #: What was last said of an undefined score.
        self._announced = ""
        #: Score and step of the best checkpoint if that could not be written.
        self._unsaved_best: Optional[Tuple[Optional[float], Optional[int]]] = None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after a checkpoint, given the content of its `trainer_state.json`.

        If `train.monitor` was another, the next validated checkpoint is the best.
        """
        if state.get("monitor", MONITOR) == self._monitor:
            self.best_score, self.best_step = state["best_score"], state["best_step"]
        self.tried_step, self._tried_validation = state["step"], state["evaluated_step"]

    def restore_folder(self) -> None:
        """Make the run's folder that of the current step."""
        if not self.trainer.checkpoints.restore(self.trainer.global_step, self.best_step):
            self.forget_best()

    def forget_best(self) -> None:
        """Make the next validated checkpoint the best."""
        self.best_score = self.best_step = None

    def monitored(self) -> Optional[float]:
        """Return `train.monitor` of the last validation; None where it is undefined.

        Raises ConfigError if there is no such score. A module's own metrics may lack the default.
        """
        outputs: EvalOutputs = self.trainer.validation_outputs
        scores = {**outputs.scores, "loss": outputs.loss}
        if self._monitor != MONITOR:
            refuse_unknown_score(self._monitor, scores)
        return scores.get(self._monitor)

    def save_if_best(self, score: Optional[float]) -> None:
        """Save after a validation, if its score is the best or a checkpoint is due.

        A best checkpoint that cannot be written is none: `best` stays at the one before.
        """
        trainer = self.trainer
        before = self.best_score, self.best_step
        is_best = self._update_best(score)
        # The main process decides: saving takes all of them.
        is_best = trainer.engine.any_process(is_best and trainer.is_global_zero)
        if (is_best or trainer.checkpoint_is_due) and self.save(is_best=is_best) is None:
            self._unsaved_best = (self.best_score, self.best_step) if is_best else None
            self.best_score, self.best_step = before

    def _update_best(self, score: Optional[float]) -> bool:
        """Return whether the score is the best; as long as none is defined, every one is."""
        step = self.trainer.global_step
        if score is not None and not math.isfinite(score):
            score = None
        if score is None:  # no label of the validation split has both positives and negatives
            effect = "best follows the last one" if self.best_score is None else "best stays"
            if effect != self._announced:
                logger.warning("val/%s is undefined at step %d: %s", self._monitor, step, effect)
            self._announced = effect
        sign = -1.0 if less_is_better(self._monitor) else 1.0
        is_best = self.best_score is None or (
            score is not None and sign * score > sign * self.best_score
        )
        if is_best:
            self.best_score, self.best_step = score, step
        return is_best

    def save(self, *, is_best: bool, is_end: bool = False) -> Optional[Path]:
        """Save the current step; see `Trainer.save_checkpoint`."""
        trainer = self.trainer
        store, step = trainer.checkpoints, trainer.global_step
        state = trainer.engine.state_dict()
        broken = [name for name, weight in state.weights.items() if not weight.isfinite().all()]
        if broken:
            raise NonFiniteLoss(
                f"{len(broken)} weights are not finite at step {step}, first {broken[0]}; they are"
                f" not saved. The last checkpoint is {store.linked('last')}."
            )
        files = trainer.module.model.hub_files()
        files[trainer.run.config.name] = trainer.run.config_text(trainer.config)
        trainer_state = collect_state(trainer)
        self.tried_step, self._tried_validation = step, trainer.evaluated_step
        try:
            path: Path = store.save(step, state, files=files, trainer_state=trainer_state)
        except (OSError, SafetensorError) as error:
            self._error = str(error)
            if not is_end:
                logger.warning(
                    "the checkpoint of step %d cannot be written: %s. Training goes on and tries"
                    " again with the next one. The last checkpoint is %s.",
                    *(step, error, store.linked("last")),
                )
            return None
        self._error = None
        with only_warning(path):
            if is_best:
                store.link("best", path)
            store.prune(trainer.config.train.keep_last)
        return path

    def save_the_end(self) -> None:
        """Save the last step unless that is done. Raises CheckpointError if it fails."""
        trainer = self.trainer
        now = trainer.global_step, trainer.evaluated_step
        is_tried = (self.tried_step, self._tried_validation) == now
        if not is_tried or trainer.engine.any_process(self._error is not None):
            is_best = self._unsaved_best is not None and self._unsaved_best[1] == now[0]
            if is_best and self._unsaved_best is not None:
                self.best_score, self.best_step = self._unsaved_best
            self.save(is_best=is_best, is_end=True)
        if self._error is not None:
            raise CheckpointError(
                f"the last checkpoint, of step {now[0]}, cannot be written: {self._error}. Make"
                f" room in {trainer.run.path} and resume the run: --resume {trainer.run.path}"
            )


def collect_state(trainer: Any) -> Dict[str, Any]:
    """Return the state of a trainer, JSON-able, after `on_save_checkpoint` of the callbacks.

    Raises CheckpointError if a callback adds what JSON cannot hold, or changes the trainer's keys.
    """
    states: Dict[str, Any] = {}
    for callback in trainer.callbacks:
        state_dict = callback.state_dict()
        if state_dict:
            check_json(f"{type(callback).__name__}.state_dict()", state_dict)
            states[callback.state_key] = state_dict
    state = {
        **trainer.resume_facts(),
        "evaluated_step": trainer.evaluated_step,
        "best_score": trainer.saver.best_score,
        "best_step": trainer.saver.best_step,
        "monitor": trainer.config.train.monitor,
        "callbacks": states,
    }
    own = dict(state)
    for callback in trainer.callbacks:
        callback.on_save_checkpoint(trainer, trainer.module, state)
    taken = [key for key, value in own.items() if state.get(key) != value]
    taken += [key for key in RESERVED if key in state]
    if taken:
        raise CheckpointError(
            f"a callback's on_save_checkpoint set {', '.join(taken)}, which a resume relies on."
            " Use a key of its own."
        )
    check_json("what callbacks add in on_save_checkpoint", state)
    return state


def restore_callbacks(trainer: Any, state: Dict[str, Any]) -> None:
    """Restore the callbacks' state, after their `setup`, which may set the initial one.

    Raises CheckpointError if a built-in callback cannot use its state.
    """
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, trainer.module, state)
    for callback in trainer.callbacks:
        if callback.state_key not in state["callbacks"]:
            continue
        try:
            callback.load_state_dict(state["callbacks"][callback.state_key])
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(map(str, detail["loc"]))
            raise CheckpointError(
                f"the checkpoint's state of {callback.state_key} is wrong: {where}:"
                f" {detail['msg']}. Use another checkpoint."
            ) from error
