"""Runs of six steps with given validation scores, and callbacks that watch or stop them."""

import torch

from cxr_vit import Callback, ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.training.checkpoint import load_checkpoint


class Recorder(Callback):
    """Records the hooks, each with its step."""

    def __init__(self):
        self.events = []
        self.lrs = []
        self.losses = []

    def on_fit_start(self, trainer, module):
        self.events.append(("fit_start", trainer.global_step))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.events.append(("step", outputs.step))
        self.lrs.append(outputs.lr)
        self.losses.extend(outputs.losses.tolist())

    def on_validation_end(self, trainer, module):
        self.events.append(("validation", trainer.validation_outputs.step))

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.events.append(("checkpoint", trainer.global_step))

    def on_fit_end(self, trainer, module):
        self.events.append(("fit_end", trainer.global_step))

    def on_exception(self, trainer, module, exception):
        self.events.append((type(exception).__name__, trainer.global_step))

    def of(self, kind):
        return [step for name, step in self.events if name == kind]


class StopAt(Callback):
    """Interrupts the run within a step, as a signal does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if outputs.step == self.step:
            trainer.interrupt("test")


class AtStart(Callback):
    """Calls a function with the trainer before the first step."""

    def __init__(self, function):
        self.function = function

    def on_fit_start(self, trainer, module):
        self.function(trainer)


class Scored(ViTModule):
    """Has given validation scores."""

    def __init__(self, config, data=None, *, scores=(), **options):
        super().__init__(config, data, **options)
        self.upcoming = iter(scores)

    def compute_metrics(self, logits, labels):
        return {"auroc_macro": next(self.upcoming, 0.5)}


class Run:
    """A trainer with its module; its folder is the same in all runs of one name."""

    def __init__(self, config, scores, callbacks, loggers):
        self.data = ChestXrayDataModule(config)
        self.trainer = Trainer(config, callbacks=callbacks, loggers=loggers)
        self.module = Scored(config, self.data, scores=scores)
        self.folder = config.run.dir

    def fit(self, ckpt_path=None):
        self.trainer.fit(self.module, self.data, ckpt_path=ckpt_path)
        return self.trainer

    def resume(self):
        return self.fit(self.folder)


def last_state(trainer):
    """Return the engine's state and the content of trainer_state.json of the last checkpoint."""
    return load_checkpoint(trainer.checkpoints.linked("last"))


def assert_same_state(one, other):
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert one.optimizer.keys() == other.optimizer.keys()
    for name, slots in one.optimizer.items():
        for slot, value in slots.items():
            assert torch.equal(value, other.optimizer[name][slot]), (name, slot)
