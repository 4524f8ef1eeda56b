"""Train a model.

python train.py --config configs/vit_demo.yaml [more.yaml ...] [section.key=value ...]
python train.py --resume runs/<name>
python train.py --config configs/vit_pod4.yaml --compile-only
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Dict, Sequence

from cxr_vit.cli import EXIT_STOPPED, run, train_arguments
from cxr_vit.config import BatchPlan, Config, check, load_config
from cxr_vit.engines.processes import Launch
from cxr_vit.planner.estimate import plan_of_run, preflight
from cxr_vit.training.run_folder import RunFolder, open_run, with_weights_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = train_arguments(argv)
    launch = Launch.from_environment()
    if arguments.compile_only:
        from cxr_vit.training.build import check_offline, compile_offline

        config = check(load_config(arguments.files, arguments.overrides))
        check_offline(config)
        preflight(config, "poptorch")
        print(compile_offline(config, launch))
        return 0
    opened = open_run(arguments.files, arguments.overrides, arguments.resume, launch)
    print(opened.folder.path, flush=True)
    with opened.folder.locked():
        return train(opened.config, opened.folder, launch, resume=opened.resumes)


def train(config: Config, folder: RunFolder, launch: Launch, *, resume: bool) -> int:
    """Build the run and train; return the exit status."""
    from cxr_vit.engines.choice import build_engine, choose_engine
    from cxr_vit.engines.process_group import coordinator
    from cxr_vit.evaluation.figures import image_grid, roc_figure
    from cxr_vit.evaluation.metrics import flat_scores
    from cxr_vit.model.stages import StagedViT
    from cxr_vit.synthetic.dataset import write_sample_if_absent
    from cxr_vit.training.build import build_callbacks, build_trainer, open_data
    from cxr_vit.training.trainer import StopOnSignal

    choice = choose_engine(config, launch)
    preflight(config, choice.name, launch.local_replicas)
    with coordinator(launch).main_first("sample"):
        write_sample_if_absent(config.data)
    data = open_data(config.data, launch)
    names, batch = data.names, BatchPlan.from_section(config.batch)
    source = with_weights_of(config, folder.last) if resume else config
    model = StagedViT.from_config(
        source, names=names, prevalence=data.prevalence(), for_ipu=choice.is_ipu
    )
    callbacks = build_callbacks(
        config,
        folder,
        start_figures=lambda trainer: {
            "train/images": image_grid(trainer.train_data, names),
            **(plan_figures(config) if choice.is_ipu else {}),
        },
        eval_figures=lambda event: {"val/roc": roc_figure(event.logits, event.labels, names)},
    )
    score = partial(flat_scores, names=names)
    with build_engine(config, model, choice, batch, launch) as engine:
        trainer = build_trainer(config, folder, data, engine, callbacks, score, model.hub_files())
        if resume:
            trainer.resume(folder.last, weights_only=config.train.resume_weights_only)
        else:
            folder.write_environment(engine.describe(), engine.facts(), data.fingerprint())
        folder.write_config(config)
        folder.write_skipped(data.skipped)
        print(data.describe(), engine.describe(), sep="\n")
        print(*model.plan.describe(engine.place), *batch.describe(), sep="\n")
        print(trainer.durations.describe(trainer.step), flush=True)
        with StopOnSignal(trainer.interrupt, quiet=launch.has_others):
            trainer.fit()
    print(trainer.describe_end(), flush=True)
    return EXIT_STOPPED if trainer.interrupted and not trainer.is_complete else 0


def plan_figures(config: Config) -> Dict[str, Figure]:
    """Draw the plan of a run on IPUs; none if the planner does not know the model's shape."""
    from cxr_vit.planner.figures import memory_figure, timeline_figure

    plan = plan_of_run(config)
    if plan is None:
        return {}
    return {"plan/timeline": timeline_figure(plan), "plan/memory": memory_figure(plan)}


if __name__ == "__main__":
    run(main)
