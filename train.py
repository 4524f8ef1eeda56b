"""Train: config -> data -> model -> engine -> trainer, only composed here.

python train.py --config configs/vit_demo.yaml [more.yaml ...] [section.key=value ...]
python train.py --resume runs/<name>
python train.py --config configs/vit_pod4.yaml --compile-only
"""

from __future__ import annotations

from functools import partial
from typing import Sequence

from cxr_vit.cli import EXIT_STOPPED, run, train_arguments
from cxr_vit.config import BatchPlan, Config, check, load_config
from cxr_vit.engines.processes import Launch
from cxr_vit.planner.estimate import preflight
from cxr_vit.training.run_folder import RunFolder, open_run, with_weights_of
from cxr_vit.training.schedule import Durations, LearningRate


def main(argv: Sequence[str]) -> int:
    """Train as the command line says; return the exit status."""
    arguments = train_arguments(argv)
    if arguments.compile_only:
        from cxr_vit.engines.ipu.offline import compile_offline

        print(compile_offline(check(load_config(arguments.files, arguments.overrides))))
        return 0
    opened = open_run(arguments.files, arguments.overrides, arguments.resume)
    print(opened.folder.path, flush=True)
    with opened.folder as folder:
        return train(opened.config, folder, resume=opened.resumes)


def train(config: Config, folder: RunFolder, *, resume: bool) -> int:
    """Put the run together and fit; return the exit status."""
    from cxr_vit.engines.choice import build_engine, choose_engine
    from cxr_vit.engines.process_group import main_first
    from cxr_vit.evaluation.figures import roc_figure, start_figures
    from cxr_vit.evaluation.metrics import flat_scores
    from cxr_vit.model.stages import StagedViT
    from cxr_vit.synthetic.dataset import write_sample_if_absent
    from cxr_vit.training.build import open_alike, watchers
    from cxr_vit.training.checkpoint import CheckpointStore
    from cxr_vit.training.trainer import StopOnSignal, Trainer

    choice = choose_engine(config)
    preflight(config, choice.name, choice.local_replicas)
    with main_first("sample"):
        write_sample_if_absent(config.data)
    data = open_alike(config.data)
    training = data.dataset("train", augment=config.augment, seed=config.run.seed)
    names = data.names
    batch = BatchPlan.from_section(config.batch)
    durations = Durations.from_section(config.train, batch, len(training))
    source = with_weights_of(config, folder.checkpoints / "last") if resume else config
    model = StagedViT.from_config(
        source, names=names, prevalence=data.prevalence(), for_ipu=choice.is_ipu
    )
    with build_engine(config, model, choice) as engine:
        trainer = Trainer(
            engine=engine,
            train=training,
            val=data.dataset("val"),
            durations=durations,
            learning_rate=LearningRate.from_section(
                config.schedule, peak=config.optim.lr, total_steps=durations.total_steps
            ),
            seed=config.run.seed,
            callbacks=watchers(
                config,
                folder,
                training,
                checkpoint_every=durations.checkpoint_every,
                figures=partial(start_figures, config, choice.name, training, names),
                roc=partial(roc_figure, names=names, title="validation ROC"),
            ),
            score=partial(flat_scores, names=names),
            store=CheckpointStore(folder.checkpoints, writes=folder.writes),
            model_files=model.hub_files(),
            origin={"labels": names, **data.fingerprint()},
        )
        if resume:
            weights_only = config.train.resume_weights_only
            trainer.resume(folder.checkpoints / "last", weights_only=weights_only)
        else:
            folder.write_environment(device=engine.describe(), data=data.fingerprint())
        folder.write_config(config)
        folder.write_skipped(data.skipped)
        print(data.describe(), engine.describe(), sep="\n")
        print(*model.plan.describe(engine.place), *batch.describe(), sep="\n")
        print(durations.describe(trainer.step), flush=True)
        with StopOnSignal(trainer.interrupt, quiet=Launch.from_environment().has_others):
            trainer.fit()
    print(trainer.describe_end(), flush=True)
    return EXIT_STOPPED if trainer.interrupted and not trainer.is_complete else 0


if __name__ == "__main__":
    run(main)
