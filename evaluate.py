"""Score a split with a checkpoint, using the configuration of its run.

python evaluate.py --checkpoint runs/<name>/checkpoints/best [--split test] [--out DIR]
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from cxr_vit.cli import evaluate_arguments, run
from cxr_vit.config import BatchPlan, check, load_config
from cxr_vit.engines.processes import Launch
from cxr_vit.training.run_folder import RunFolder, run_of_checkpoint, with_weights_of


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = evaluate_arguments(argv)
    launch = Launch.from_environment()
    folder = RunFolder(run_of_checkpoint(arguments.checkpoint), writes=launch.is_main)
    config = load_config([folder.config], arguments.overrides)
    config = check(with_weights_of(config, arguments.checkpoint))

    from rich.console import Console

    from cxr_vit.engines.choice import build_engine, choose_engine
    from cxr_vit.evaluation.report import print_table, write_report
    from cxr_vit.model.stages import StagedViT
    from cxr_vit.training.build import open_data
    from cxr_vit.training.checkpoint import verify_checkpoint

    choice = choose_engine(config, launch)
    state = verify_checkpoint(arguments.checkpoint, needs_optimizer=False)
    data = open_data(config.data, launch)
    split = arguments.split or data.default_split()
    dataset = data.dataset(split)
    out: Path = arguments.out or folder.report(split, is_default=split == data.default_split())
    out.mkdir(parents=True, exist_ok=True)  # now: scoring may take long
    origin = {
        "checkpoint": str(arguments.checkpoint),
        "step": state["step"],
        **data.fingerprint(),
        "changed_since_training": data.warn_if_changed(state),
    }
    model = StagedViT.from_config(config, names=data.names, prevalence=None, for_ipu=choice.is_ipu)
    batch = BatchPlan.from_section(config.batch)
    with build_engine(config, model, choice, batch, launch) as engine:
        print(engine.describe(), data.describe(), sep="\n", flush=True)
        logits, labels = engine.predict_dataset(dataset)
        if not engine.is_main:
            return 0
    metrics = write_report(
        out,
        dataset.records,
        split=split,
        names=data.names,
        logits=logits,
        labels=labels,
        origin=origin,
    )
    print_table(metrics, Console())
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    run(main)
