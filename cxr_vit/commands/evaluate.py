"""Score a split with a checkpoint, using the configuration of its run.

python evaluate.py --checkpoint runs/<name> [--split test] [--out DIR]
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from rich.console import Console

from cxr_vit.cli import evaluate_arguments
from cxr_vit.config import check, read_config
from cxr_vit.data.text_files import check_data_root
from cxr_vit.files import checkpoint_of, run_of_checkpoint
from cxr_vit.training.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = evaluate_arguments(argv)
    checkpoint = checkpoint_of(arguments.checkpoint)
    folder = RunFolder(run_of_checkpoint(checkpoint), writes=False)
    config = read_config([folder.config], arguments.overrides)
    # Scoring needs neither the initial weights nor any class that a run's configuration names.
    config = config.changed(model={"name": str(checkpoint)}, callbacks=[], loggers=[])
    check(config)
    check_data_root(config.data)

    from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
    from cxr_vit.evaluation.report import print_table, write_report
    from cxr_vit.training.checkpoint import verify_checkpoint

    state = verify_checkpoint(checkpoint, needs_optimizer=False)
    trainer, data = Trainer(config), ChestXrayDataModule(config)
    module = ViTModule.load_from_checkpoint(checkpoint, data, config=config)
    trainer.setup_data(data)
    split = arguments.split or data.default_split()
    records = data.dataset(split).records
    out: Path = arguments.out or folder.report(split, is_default=split == data.default_split())
    out.mkdir(parents=True, exist_ok=True)  # now: scoring may take long
    origin = {"checkpoint": str(checkpoint), "step": state["step"], **data.fingerprint()}
    origin["changed_since_training"] = data.warn_if_changed(state)
    print(data.describe(), flush=True)
    trainer.test(module, data, split=split)
    if trainer.is_global_zero:
        outputs = trainer.test_outputs
        metrics = write_report(
            out,
            records,
            split=split,
            names=module.names,
            logits=outputs.logits,
            labels=outputs.labels,
            origin=origin,
        )
        print_table(metrics, Console())
        print(f"report: {out}")
    return 0
