"""Whether the trainer, the module and the data were made with the same configuration."""

from __future__ import annotations

from typing import Collection, Iterable

import torch

from cxr_vit.config import Config
from cxr_vit.config.schema import TrainSection
from cxr_vit.errors import ConfigError, suggestion
from cxr_vit.evaluation.metrics import MACRO_LIMITS
from cxr_vit.model.module import ViTModule
from cxr_vit.model.optim import explaining_missing_rate

#: Settings that images and labels, as the model sees them, depend on.
_SHAPES = ("data.image_size", "data.resize", "data.include_no_finding")
#: Settings of the data that do not change what is trained.
_NOT_CONTENT = {
    "data.cache", "data.cache_dir", "data.cache_workers", "data.num_workers",
    "data.worker_timeout_s",
}  # fmt: skip


def check_module_config(config: Config, module: ViTModule) -> None:
    """Raise ConfigError if the module was made for another model, loss, optimizer or seed."""
    sections = ("model.", "pipeline.", "loss.", "optim.", "schedule.", "run.seed")
    keys = {key for key in config.flat() if key.startswith(sections)} | set(_SHAPES)
    if module.checkpoint:  # then the name is its path
        keys.remove("model.name")
    if config.optim.base_lr is not None:  # then the rate depends on the batch
        keys.add("peak_lr")
    if config.schedule.warmup_epochs is not None:  # as a fraction of these
        keys.add("train.epochs")
    _check_same("module", config, module.config, keys)


def check_data_config(config: Config, data_config: Config, *, trains: bool) -> None:
    """Raise ConfigError if the data would be others than the run's config.yaml says.

    Scoring needs images of the same size only; labels are compared by name. Training needs a split.
    """
    keys = {"data.image_size", "data.resize", "data.resample"}
    if trains and config.data.split == "all":
        raise ConfigError(
            "data.split=all makes every image a test image and leaves none to train. Set another"
            " data.split, or score the images with evaluate.py."
        )
    if trains:
        sections = ("data.", "augment.", "run.seed")
        keys = {key for key in config.flat() if key.startswith(sections)} - _NOT_CONTENT
    _check_same("data module", config, data_config, keys)


def check_monitor(config: Config, module: ViTModule) -> None:
    """Raise ConfigError if a validation will have no score `train.monitor`.

    What a module of the user's own returns is known after the first validation only.
    """
    has_own = type(module).compute_metrics is not ViTModule.compute_metrics
    if has_own or config.train.monitor in (TrainSection().monitor, "loss"):
        return
    example = torch.tensor([[0.0], [1.0]]).expand(2, len(module.names))
    names = [*module.compute_metrics(example, example), "loss"]
    if config.evaluation.val_resamples:
        names += MACRO_LIMITS
    refuse_unknown_score(config.train.monitor, names)


def refuse_unknown_score(monitor: str, names: Collection[str]) -> None:
    """Raise ConfigError if `train.monitor` is none of the scores of a validation."""
    if monitor not in names:
        raise ConfigError(
            f"train.monitor={monitor}: a validation has no such score.{suggestion(monitor, names)}"
            f" There are: {', '.join(names)}."
        )


def rate_at(module: ViTModule, step: int, total_steps: int) -> float:
    """Return the rate of an update; ConfigError where the module computes with a rate of None."""
    with explaining_missing_rate(module.config):
        return module.learning_rate(step, total_steps)


def _check_same(what: str, config: Config, other: Config, keys: Iterable[str]) -> None:
    own, its = ({**one.flat(), "peak_lr": one.peak_lr} for one in (config, other))
    differing = [
        f"{key}={its[key]} there, {own[key]} here"
        for key in own
        if key in keys and its[key] != own[key]
    ]
    if differing:
        raise ConfigError(
            f"the {what} was made with another configuration than the trainer:"
            f" {'; '.join(differing)}. Give both the same."
        )
