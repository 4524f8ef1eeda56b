"""Score a split with a checkpoint: config -> data -> model -> engine -> evaluation.

    python evaluate.py --checkpoint runs/<name>/checkpoints/best [--split test] [--out DIR]

Only a composition. The configuration is the run's own, with the same overrides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from cxr_vit.cli import evaluate_arguments, run
from cxr_vit.config import check, load_config
from cxr_vit.training.run_folder import RunFolder, run_of_checkpoint, with_weights_of


def main(argv: Sequence[str]) -> int:
    """Evaluate as the command line says; return the exit status."""
    arguments = evaluate_arguments(argv)
    folder = RunFolder(run_of_checkpoint(arguments.checkpoint))
    config = load_config([folder.config], arguments.overrides)
    config = check(with_weights_of(config, arguments.checkpoint))

    from rich.console import Console

    from cxr_vit.engines.choice import build_engine, choose_engine
    from cxr_vit.evaluation.report import print_table, write_report
    from cxr_vit.model.stages import StagedViT
    from cxr_vit.training.build import open_alike
    from cxr_vit.training.checkpoint import verify_checkpoint

    choice = choose_engine(config)
    state = verify_checkpoint(arguments.checkpoint, needs_optimizer=False)
    data = open_alike(config.data)
    split = arguments.split or data.default_split()
    dataset = data.dataset(split)
    out: Path = arguments.out or folder.report(split, is_default=split == data.default_split())
    out.mkdir(parents=True, exist_ok=True)  # before the scoring, which may take long
    origin = data.fingerprint()
    changed = data.warn_if_changed(state)
    model = StagedViT.from_config(config, names=data.names, prevalence=None, for_ipu=choice.is_ipu)
    with build_engine(config, model, choice) as engine:
        print(f"{engine.describe()}\n{data.describe()}", flush=True)
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
        origin={
            "checkpoint": str(arguments.checkpoint),
            "step": state["step"],
            **origin,
            "changed_since_training": changed,
        },
    )
    print_table(metrics, Console())
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    run(main)
