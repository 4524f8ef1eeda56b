"""Build the data and the trainer of a run, for train.py and for tests."""

from __future__ import annotations

from typing import Callable, Dict, List, Sequence

from torch import Tensor

from cxr_vit.config import Config, dump_config
from cxr_vit.config.schema import DataSection
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.engines.base import Engine
from cxr_vit.engines.process_group import run_store
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import DataError
from cxr_vit.training.callbacks import EarlyStopping, NonFiniteGuard, ProgressDisplay
from cxr_vit.training.checkpoint import CheckpointStore
from cxr_vit.training.loggers import Figures, JsonlLogger, MetricsLogging, TensorBoardLogger
from cxr_vit.training.run_folder import RunFolder
from cxr_vit.training.schedule import Durations, LearningRate
from cxr_vit.training.trainer import Callback, EvalEnd, Scores, Trainer


def open_data(data: DataSection, launch: Launch) -> ChestXrayDataModule:
    """Open the data of a configuration in all processes, in the main process first.

    Raises
    ------
    DataError
        If this process has other data than the main process: its rows would be other images.
    """
    store = run_store(launch)
    with store.main_first("data"):
        opened = ChestXrayDataModule(data, once=store.call_once)
    differing = store.differences("data", opened.fingerprint())
    if differing:
        raise DataError(
            f"this host's data differ from those of the first process: {'; '.join(differing)}."
            " Give all hosts the same CSV, lists and images."
        )
    return opened


def build_trainer(
    config: Config,
    folder: RunFolder,
    data: ChestXrayDataModule,
    engine: Engine,
    callbacks: Sequence[Callback],
    score: Callable[[Tensor, Tensor], Scores],
    model_files: Dict[str, str],
) -> Trainer:
    """Build the trainer of a run; the parameters after `engine` are those of `Trainer`."""
    train = data.dataset("train", augment=config.augment, seed=config.run.seed)
    durations = Durations.from_section(config.train, engine.batch, len(train))
    return Trainer(
        engine=engine,
        train=train,
        val=data.dataset("val"),
        durations=durations,
        learning_rate=LearningRate.from_section(
            config.schedule, peak=config.optim.lr, total_steps=durations.total_steps
        ),
        seed=config.run.seed,
        callbacks=callbacks,
        score=score,
        store=CheckpointStore(folder.checkpoints, writes=folder.writes),
        keep_last=config.train.keep_last,
        model_files=model_files,
        origin={"labels": data.names, **data.fingerprint()},
    )


def build_callbacks(
    config: Config,
    folder: RunFolder,
    *,
    start_figures: Callable[[Trainer], Figures],
    eval_figures: Callable[[EvalEnd], Figures],
) -> List[Callback]:
    """Build the callbacks of this process; only the one that writes the run displays and logs.

    `start_figures` and `eval_figures` are those of `MetricsLogging`.
    """
    callbacks: List[Callback] = [EarlyStopping(config.train.early_stopping_patience)]
    if not config.engine.synthetic_data:  # its losses are meaningless
        callbacks.insert(0, NonFiniteGuard())
    if not folder.writes:
        return callbacks
    every = config.train.log_every_steps
    tensorboard = TensorBoardLogger(
        folder.tensorboard, config_text=dump_config(config), hparams=config.flat()
    )
    metrics = MetricsLogging(
        [JsonlLogger(folder.metrics), tensorboard],
        every=every,
        start_figures=start_figures,
        eval_figures=eval_figures,
    )
    return [*callbacks, ProgressDisplay(every=every), metrics]
