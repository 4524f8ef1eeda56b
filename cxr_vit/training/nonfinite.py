"""Stop at a NaN or infinite loss or gradient and describe it, or leave its update out."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from pydantic import BaseModel, ConfigDict

from cxr_vit.data.dataset import Batch
from cxr_vit.errors import NonFiniteLoss
from cxr_vit.files import write_text
from cxr_vit.model.module import ViTModule
from cxr_vit.training.callback import Callback, TrainOutputs

logger = logging.getLogger(__name__)

#: Images that a message names.
_NAMED_IMAGES = 16
#: Updates in a row that may be left out.
_MOST_SKIPPED = 20


class NonFiniteGuard(Callback):
    """Raise NonFiniteLoss at a NaN or infinite loss or gradient norm, or count it.

    Must be the first callback, so that the others do not record such a step. On a GPU it looks one
    step late, so that a callback which reads the losses of every step gets the NaN before. The
    torch engines make no update of such a gradient. `skips` is `train.on_nonfinite=skip_update`:
    then it is an error only if it happens in 20 updates in a row.
    """

    state_key = "nonfinite"

    def __init__(self, *, skips: bool = False) -> None:
        self.skips = skips
        self.skipped = 0
        self._in_a_row = 0
        self._unread: List[Tuple[Any, TrainOutputs]] = []

    def setup(self, trainer: Any, module: ViTModule, stage: str) -> None:
        """Begin again in a new run."""
        self.skipped = self._in_a_row = 0
        self._unread = []

    def on_train_batch_end(
        self,
        trainer: Any,
        module: ViTModule,
        outputs: TrainOutputs,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Look at each update of the host batches that were read; a GPU's are one step late."""
        self._unread.append((trainer, outputs))
        while self._unread and self._unread[0][1].output.is_read:
            self._look(*self._unread.pop(0))

    def _look(self, trainer: Any, outputs: TrainOutputs) -> None:
        values = {"loss": outputs.losses}
        if outputs.grad_norm is not None:
            values["gradient norm"] = outputs.grad_norm
        skipped = self.skipped
        for index in range(len(outputs.losses)):
            bad = {what: value[index] for what, value in values.items()}
            bad = {what: value for what, value in bad.items() if not torch.isfinite(value)}
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if not bad:
                continue
            step = outputs.first_step + index
            what, value = next(iter(bad.items()))
            text = f"the {what} is {float(value)} at step {step} (lr {outputs.lr:.3g})"
            if not self.skips or self._in_a_row == _MOST_SKIPPED:
                self._stop(trainer, text, step, outputs.lr)
            if what == "loss" and len(bad) < len(values):
                effect = "its gradient is finite and its update made"
            else:
                effect = "its update is left out"
                self.skipped += 1
            logger.warning("%s; %s, images: %s", text, effect, _images(trainer, step))
        if self.skipped > skipped:
            trainer.log_metrics({"train/skipped_updates": self.skipped})

    def _stop(self, trainer: Any, text: str, step: int, lr: float) -> None:
        more = f", in the last of {_MOST_SKIPPED} updates in a row," if self.skips else ","
        last = trainer.checkpoints.linked("last")
        saved = f"The last checkpoint is {last}." if last else "No checkpoint was written yet."
        file = write_bundle(trainer, step, lr)
        key = "optim.lr" if trainer.config.optim.base_lr is None else "optim.base_lr"
        raise NonFiniteLoss(
            f"{text}{more} images: {_images(trainer, step)}. Lower {key}, set"
            " optim.max_grad_norm=1.0, use engine.precision=fp32, or leave such updates out:"
            f" train.on_nonfinite=skip_update. {saved} Details: {file}"
        )

    def state_dict(self) -> Dict[str, Any]:
        """Return the numbers of updates left out, in all and in a row; empty if there are none.

        Raises NonFiniteLoss instead, before a checkpoint is written, if an update is not finite.
        """
        while self._unread:
            self._look(*self._unread.pop(0))
        return {"skipped": self.skipped, "in_a_row": self._in_a_row} if self.skipped else {}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore the numbers of updates left out."""
        state = _Skipped.model_validate(state_dict)
        self.skipped, self._in_a_row = state.skipped, state.in_a_row


class _Skipped(BaseModel):
    """State of `NonFiniteGuard`."""

    model_config = ConfigDict(strict=True)

    skipped: int
    in_a_row: int


def _images(trainer: Any, step: int) -> str:
    rows = trainer.rows(step)
    names = [trainer.train_data.image_names[row] for row in rows[:_NAMED_IMAGES]]
    more = len(rows) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def write_bundle(trainer: Any, step: int, lr: float) -> Path:
    """Write what is needed to find the cause of a failed update; return the path of the file.

    The weights are those before the update, but on IPUs, which have made it. With
    `train.on_nonfinite=skip_update` the engine does not stop by itself: it has also made the finite
    updates that follow in the host batch and, on a GPU, in the next one. All processes must call
    this together.
    """
    inputs: Batch = trainer.train_data.__getitems__(trainer.draws(step).tolist())
    ranges = trainer.engine.activation_ranges(inputs.images)
    names = [trainer.train_data.image_names[row] for row in trainer.rows(step)]
    content = {
        "step": step,
        "lr": lr,
        "images": [
            {"name": name, "sha256": hashlib.sha256(image.numpy().tobytes()).hexdigest()}
            for name, image in zip(names, inputs.images)
        ],
        "weights": _weights(trainer.module),
        "activations": [
            {
                "stage": index,
                "smallest": _number(smallest),
                "largest": _number(largest),
                "nonfinite": nonfinite,
            }
            for index, smallest, largest, nonfinite in ranges
        ],
    }
    path: Path = trainer.run.path / f"nonfinite_step_{step:08d}.json"
    if trainer.is_global_zero:
        try:
            write_text(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error)
    return path


def _weights(module: ViTModule) -> Dict[str, Any]:
    """Return the largest weight of this process, and the names of those that are not finite."""
    parameters = list(module.model.hub_parameters())
    bad: List[str] = [name for name, weight in parameters if not weight.isfinite().all()]
    sizes: Sequence[float] = [float(weight.detach().abs().max()) for _, weight in parameters]
    return {"largest": _number(max(sizes, default=math.nan)), "nonfinite": bad}


def _number(value: float) -> Optional[float]:
    return value if math.isfinite(value) else None
