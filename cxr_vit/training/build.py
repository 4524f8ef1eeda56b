"""Build the data and the trainer of a run, or compile its graphs only."""

from __future__ import annotations

from typing import Callable, Dict, List, Sequence

import numpy as np
from torch import Tensor

from cxr_vit.config import Config, dump_config
from cxr_vit.config.ipu_rules import check_ipu
from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import DataSection
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch
from cxr_vit.data.labels import label_names
from cxr_vit.engines.base import Engine
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.ipu.engine import PopTorchEngine
from cxr_vit.engines.process_group import coordinator
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError, DataError, DeviceError
from cxr_vit.model.stages import StagedViT
from cxr_vit.training.callbacks import EarlyStopping, NonFiniteGuard, ProgressDisplay
from cxr_vit.training.checkpoint import CheckpointStore
from cxr_vit.training.loggers import Figures, JsonlLogger, MetricsLogging, TensorBoardLogger
from cxr_vit.training.run_folder import RunFolder
from cxr_vit.training.schedule import Durations, LearningRate
from cxr_vit.training.trainer import Callback, EvalEnd, Scores, Trainer


def open_data(data: DataSection, launch: Launch) -> ChestXrayDataModule:
    """Open the data of a configuration in all processes, in the main process first.

    Raises DataError if this process has other data: its rows would be other images.
    """
    processes = coordinator(launch)
    with processes.main_first("data"):
        opened = ChestXrayDataModule(data, once=processes.call_once)
    differing = processes.differences("data", opened.fingerprint())
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
        train_data=train,
        val_data=data.dataset("val"),
        durations=durations,
        learning_rate=LearningRate.from_section(
            config.schedule, peak=config.optim.lr, total_steps=durations.total_steps
        ),
        seed=config.run.seed,
        callbacks=callbacks,
        score=score,
        checkpoints=CheckpointStore(folder.checkpoints, writes=folder.writes),
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


def check_offline(config: Config) -> None:
    """Raise ConfigError if no cache is given, or PopTorch refuses the configuration."""
    check_ipu(config)
    if config.engine.executable_cache is None:
        raise ConfigError(
            "engine.executable_cache=null: --compile-only would throw its work away. Name a folder."
        )
    if config.engine.log_cycles:
        raise ConfigError("engine.log_cycles=true needs an IPU: leave it out with --compile-only.")


def compile_offline(config: Config, launch: Launch) -> str:
    """Compile both graphs into `engine.executable_cache`; return a line about the result.

    Weights are sent when a graph is attached, so neither data nor a trained head is needed.

    Raises
    ------
    EngineUnavailable
        If PopTorch is not installed.
    DeviceError
        If compilation fails, or the cache is empty afterwards.
    """
    names = label_names(include_no_finding=config.data.include_no_finding)
    choice = choose_engine(config, launch, offline=True)
    prevalence = np.full(len(names), 0.5)
    model = StagedViT.from_config(config, names=names, prevalence=prevalence, for_ipu=True)
    batch = BatchPlan.from_section(config.batch)
    with build_engine(config, model, choice, batch, launch, offline=True) as engine:
        size = engine.local_batch.host_batch_size
        example = Batch.zeros(size, image_size=config.data.image_size, num_classes=len(names))
        seconds = engine.compile(example)
        assert isinstance(engine, PopTorchEngine)
        cache = engine.graphs.cache
    if not cache.files():
        raise DeviceError(
            f"both graphs were compiled, but PopTorch left nothing in {cache.path}. Is the folder"
            " writable, and the disk full? Name another engine.executable_cache."
        )
    return f"compiled for {config.engine.ipu_version} in {seconds:.1f} s into {cache.path}"
