"""The interface of callbacks, with Lightning's hook names.

A run calls the hooks in this order::

    setup                        # before compilation
    if a run is resumed: on_load_checkpoint
    on_fit_start, on_train_start
    for each host batch:
        on_train_epoch_start     # at the first host batch of an epoch
        on_train_batch_start, on_train_batch_end
        if a validation is due: on_validation_start, on_validation_end
        if a checkpoint is due or the score is the best: on_save_checkpoint
        on_train_epoch_end       # at the last host batch of an epoch
    on_train_end, on_fit_end     # or on_exception
    teardown
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Optional

from torch import Tensor

from cxr_vit.data.dataset import Batch
from cxr_vit.engines.base import StepOutput
from cxr_vit.errors import ConfigError, suggestion
from cxr_vit.model.module import ViTModule


@dataclass(frozen=True)
class TrainOutputs:
    """Result of a host batch: the weight updates `first_step` to `step` - 1.

    `lr` is their learning rate, `wait_s` the time spent waiting for the data, `seconds` the time
    spent in the engine. A GPU may still be computing the numbers of `output`: `losses` and
    `grad_norm` wait for them. There, `seconds` is the time since the step before, without `wait_s`,
    and `wait_s` is 0 if the device was busy all the while.
    """

    first_step: int
    step: int
    output: StepOutput
    lr: float
    wait_s: float
    seconds: float

    @property
    def losses(self) -> Tensor:
        """The loss of each update, float32 ``[device_iterations]``."""
        return self.output.losses

    @property
    def grad_norm(self) -> Optional[Tensor]:
        """The norm of each update's gradient, as `losses`; None on IPUs."""
        return self.output.grad_norm

    @property
    def num_samples(self) -> int:
        """Samples of all processes."""
        return self.output.num_samples


class Callback:
    """Base of callbacks; every hook does nothing. A method ``on_*`` that is no hook is refused.

    A callback observes a run. It may stop it (`trainer.request_stop`, `trainer.interrupt`) and log
    (`trainer.log_metrics`). Every process calls its own callbacks; only the one with
    `trainer.is_global_zero` may write files or print.

    The `trainer` is a `cxr_vit.Trainer`, which imports this module.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in vars(cls):
            if name.startswith("on_") and not hasattr(Callback, name):
                near = suggestion(name, [hook for hook in dir(Callback) if hook.startswith("on_")])
                raise ConfigError(
                    f"{cls.__name__}.{name} is no hook of a callback.{near} docs/lightning.md lists"
                    " all of them."
                )

    @property
    def state_key(self) -> str:
        """Name of the callback's state in a checkpoint; two callbacks need two names."""
        return type(self).__qualname__

    def setup(self, trainer: Any, module: ViTModule, stage: str) -> None:
        """Run when the engine is built; `stage` is fit, validate, test or predict."""

    def teardown(self, trainer: Any, module: ViTModule, stage: str) -> None:
        """Run when the stage ends without an error, after the engine is closed."""

    def on_fit_start(self, trainer: Any, module: ViTModule) -> None:
        """Run after compilation, before the first step."""

    def on_fit_end(self, trainer: Any, module: ViTModule) -> None:
        """Run after the last checkpoint is saved, also after a requested stop."""

    def on_train_start(self, trainer: Any, module: ViTModule) -> None:
        """Run after `on_fit_start`."""

    def on_train_end(self, trainer: Any, module: ViTModule) -> None:
        """Run after the last step, before `on_fit_end`."""

    def on_train_epoch_start(self, trainer: Any, module: ViTModule) -> None:
        """Run before the first host batch of an epoch, and of a resumed run."""

    def on_train_epoch_end(self, trainer: Any, module: ViTModule) -> None:
        """Run after the last host batch of an epoch, and of the run, and after its validation."""

    def on_train_batch_start(
        self, trainer: Any, module: ViTModule, batch: Batch, batch_idx: int
    ) -> None:
        """Run before each host batch; `batch_idx` counts the host batches of the epoch from 0."""

    def on_train_batch_end(
        self,
        trainer: Any,
        module: ViTModule,
        outputs: TrainOutputs,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Run after each host batch: `device_iterations` weight updates.

        Copy what you keep of the batch: loaders use its memory again.
        """

    def on_validation_start(self, trainer: Any, module: ViTModule) -> None:
        """Run before each validation."""

    def on_validation_end(self, trainer: Any, module: ViTModule) -> None:
        """Run after each validation; see `trainer.callback_metrics` and `validation_outputs`."""

    def on_test_start(self, trainer: Any, module: ViTModule) -> None:
        """Run before a test."""

    def on_test_end(self, trainer: Any, module: ViTModule) -> None:
        """Run after a test; see `trainer.callback_metrics` and `test_outputs`."""

    def on_save_checkpoint(
        self, trainer: Any, module: ViTModule, checkpoint: Dict[str, Any]
    ) -> None:
        """Run before a checkpoint is written; `checkpoint` becomes trainer_state.json.

        Add JSON-able values under keys of your own, or return them from `state_dict`.
        """

    def on_load_checkpoint(
        self, trainer: Any, module: ViTModule, checkpoint: Dict[str, Any]
    ) -> None:
        """Run when a run resumes, with what `on_save_checkpoint` saw."""

    def on_exception(self, trainer: Any, module: ViTModule, exception: BaseException) -> None:
        """Run if an error ends the training."""

    def state_dict(self) -> Dict[str, Any]:
        """Return the JSON-able state that a resumed run needs."""
        return {}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore what `state_dict` returned; not called if the checkpoint has no state of it."""
