"""Score a split with a checkpoint, using the configuration of its run.

python evaluate.py --checkpoint runs/<name> [--split test] [--out DIR]
"""

from __future__ import annotations

from typing import Sequence

from cxr_vit.checkpoint_files import checkpoint_of, verify_checkpoint
from cxr_vit.cli import evaluate_arguments
from cxr_vit.data.text_files import check_data_root
from cxr_vit.training.run_folder import config_of_checkpoint, report_folder


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = evaluate_arguments(argv)
    checkpoint = checkpoint_of(arguments.checkpoint)
    state = verify_checkpoint(checkpoint, needs_optimizer=False)
    config = config_of_checkpoint(checkpoint, arguments.overrides)
    check_data_root(config.data)

    from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
    from cxr_vit.commands.callbacks import DescribeEngine
    from cxr_vit.evaluation.report import make_folder, print_table, write_report

    trainer, data = Trainer(config, callbacks=[DescribeEngine()]), ChestXrayDataModule(config)
    module = ViTModule.load_from_checkpoint(checkpoint, data, config=config)
    trainer.setup_data(data)
    split = arguments.split or data.default_split()
    records = data.dataset(split).records
    default = report_folder(checkpoint, split, default=data.default_split())
    out = make_folder(arguments.out, default)  # now: scoring may take long
    origin = {"checkpoint": str(checkpoint), "step": state["step"], **data.fingerprint()}
    origin["changed_since_training"] = data.warn_if_changed(state)
    print(data.describe(), flush=True)
    trainer.test(module, data, split=split)
    if trainer.is_global_zero:
        outputs, names = trainer.test_outputs, module.names
        print_table(write_report(out, records, outputs, names=names, origin=origin))
        print(f"report: {out}")
    return 0
