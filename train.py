"""Train: config -> data -> model -> engine -> trainer, only composed here.

python train.py --config configs/vit_demo.yaml [more.yaml ...] [section.key=value ...]
python train.py --resume runs/<name>
"""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Sequence

from cxr_vit.cli import EXIT_STOPPED, run, train_arguments
from cxr_vit.config import BatchPlan, Config, dump_config
from cxr_vit.training.run_folder import RunFolder, open_run, with_weights_of
from cxr_vit.training.schedule import Durations, LearningRate

if TYPE_CHECKING:
    from cxr_vit.data.datamodule import ChestXrayDataModule
    from cxr_vit.training.callbacks import Callback


def main(argv: Sequence[str]) -> int:
    """Train as the command line says; return the exit status."""
    arguments = train_arguments(argv)
    folder, config = open_run(arguments.files, arguments.overrides, arguments.resume)
    print(folder.path, flush=True)
    with folder:
        return train(config, folder, resume=arguments.resume is not None)


def train(config: Config, folder: RunFolder, *, resume: bool) -> int:
    """Put the run together and fit; return the exit status."""
    from cxr_vit.data.datamodule import ChestXrayDataModule
    from cxr_vit.engines.choice import build_engine
    from cxr_vit.evaluation.metrics import flat_scores
    from cxr_vit.model.stages import StagedViT
    from cxr_vit.training.checkpoint import CheckpointStore
    from cxr_vit.training.signals import StopOnSignal
    from cxr_vit.training.trainer import Trainer

    data = ChestXrayDataModule(config.data)
    training = data.dataset("train")
    batch = BatchPlan.from_section(config.batch)
    durations = Durations.from_section(config.train, batch, len(training))
    source = with_weights_of(config, folder.checkpoints / "last") if resume else config
    model = StagedViT.from_config(source, names=data.names, prevalence=data.prevalence())
    with build_engine(config, model) as engine:
        trainer = Trainer(
            engine=engine,
            train=training,
            val=data.dataset("val"),
            durations=durations,
            learning_rate=LearningRate.from_section(
                config.schedule, peak=config.optim.lr, total_steps=durations.total_steps
            ),
            seed=config.run.seed,
            callbacks=watchers(config, folder, data, durations.checkpoint_every),
            score=lambda logits, labels: flat_scores(logits, labels, data.names),
            store=CheckpointStore(folder.checkpoints),
            model_files=model.hub_files(),
            origin={"labels": data.names, **data.fingerprint()},
        )
        if resume:
            trainer.resume(folder.checkpoints / "last")
        else:
            folder.write_environment(device=engine.describe(), data=data.fingerprint())
        folder.write_config(config)
        about = [data.describe(), engine.describe(), *model.plan.describe(), *batch.describe()]
        print("\n".join([*about, durations.describe(trainer.step)]), flush=True)
        with StopOnSignal(trainer.request_stop) as stop:
            trainer.fit()
    print(trainer.describe_end(), flush=True)
    return EXIT_STOPPED if stop.received and not trainer.is_complete else 0


def watchers(
    config: Config, folder: RunFolder, data: ChestXrayDataModule, checkpoint_every: int
) -> List[Callback]:
    """Make the callbacks; the one that saves comes last, so that it saves the others' state."""
    from cxr_vit.evaluation.figures import film_grid, roc_figure
    from cxr_vit.training import callbacks, loggers, progress

    names, training, every = data.names, data.dataset("train"), config.train.log_every_steps
    tensorboard = loggers.TensorBoardLogger(
        folder.tensorboard,
        config_text=dump_config(config),
        hparams=config.flat(),
        films=lambda: film_grid(training, names),
        roc=lambda logits, labels: roc_figure(logits, labels, names, title="validation ROC"),
    )
    return [
        callbacks.NonFiniteGuard(training.image_names),
        progress.ProgressDisplay(every=every),
        loggers.MetricsLogging([loggers.JsonlLogger(folder.metrics), tensorboard], every=every),
        callbacks.EarlyStopping(config.train.early_stopping_patience),
        callbacks.Checkpointing(every=checkpoint_every, keep_last=config.train.keep_last),
    ]


if __name__ == "__main__":
    run(main)
