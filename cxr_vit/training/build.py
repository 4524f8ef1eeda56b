"""The data of a run, opened by all its processes and found to be the same."""

from __future__ import annotations

from typing import Callable, List, Mapping

from matplotlib.figure import Figure
from torch import Tensor

from cxr_vit.config import Config, dump_config
from cxr_vit.config.schema import DataSection
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.engines.process_group import call_once, main_first, same_everywhere
from cxr_vit.errors import DataError
from cxr_vit.training.loggers import JsonlLogger, MetricsLogging, TensorBoardLogger
from cxr_vit.training.progress import ProgressDisplay
from cxr_vit.training.run_folder import RunFolder
from cxr_vit.training.trainer import Callback, Checkpointing, EarlyStopping, NonFiniteGuard

__all__ = ["open_alike", "watchers"]


def open_alike(data: DataSection) -> ChestXrayDataModule:
    """Open the data of a configuration, in the first process before the others.

    Parameters
    ----------
    data
        As for `ChestXrayDataModule`.

    Raises
    ------
    DataError
        If this process has other data than the first one: its rows would be other images.
    """
    with main_first("data"):
        opened = ChestXrayDataModule(data, once=call_once)
    differing = same_everywhere("data", opened.fingerprint())
    if differing:
        raise DataError(
            f"the data of this host are not those of the first process: {'; '.join(differing)}."
            " Give all hosts the same CSV, lists and images."
        )
    return opened


def watchers(
    config: Config,
    folder: RunFolder,
    training: ChestXrayDataset,
    *,
    checkpoint_every: int,
    figures: Callable[[], Mapping[str, Figure]],
    roc: Callable[[Tensor, Tensor], Figure],
) -> List[Callback]:
    """Make the callbacks; a process that does not write the run has those that all take part in.

    Parameters
    ----------
    config
        The configuration.
    folder
        The run's.
    training
        The training split.
    checkpoint_every
        Steps between saves.
    figures, roc
        Make the figures of TensorBoard: those of the start by tag, and that of a validation's
        logits and labels.
    """
    every = config.train.log_every_steps
    guards: List[Callback] = [EarlyStopping(config.train.early_stopping_patience)]
    if not config.engine.synthetic_data:  # whose losses are whatever was in the buffers
        guards.insert(0, NonFiniteGuard(training.image_names))
    # Last, so that it saves what the others know.
    saving = Checkpointing(every=checkpoint_every, keep_last=config.train.keep_last)
    if not folder.writes:
        return [*guards, saving]
    tensorboard = TensorBoardLogger(
        folder.tensorboard,
        config_text=dump_config(config),
        hparams=config.flat(),
        figures=figures,
        roc=roc,
    )
    return [
        *guards,
        ProgressDisplay(every=every),
        MetricsLogging([JsonlLogger(folder.metrics), tensorboard], every=every),
        saving,
    ]
