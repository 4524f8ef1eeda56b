"""Score a split, or another data set, with a checkpoint and the configuration of its run.

python evaluate.py --checkpoint runs/<name> [--split test] [--out DIR]
python evaluate.py --checkpoint runs/<name> --data other.yaml [data.key=value ...]
"""

from __future__ import annotations

from typing import Sequence

from cxr_vit.checkpoint_files import checkpoint_of, verify_checkpoint
from cxr_vit.cli import evaluate_arguments
from cxr_vit.commands.scored_data import scored_data
from cxr_vit.data.text_files import check_data_root
from cxr_vit.training.run_folder import config_of_checkpoint


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = evaluate_arguments(argv)
    checkpoint = checkpoint_of(arguments.checkpoint)
    state = verify_checkpoint(checkpoint, needs_optimizer=False)
    scored = scored_data(config_of_checkpoint(checkpoint, arguments.overrides), arguments)
    check_data_root(scored.config.data)

    from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
    from cxr_vit.commands.callbacks import DescribeEngine
    from cxr_vit.evaluation.report import make_folder, print_table, write_report
    from cxr_vit.training.scoring import match_of

    trainer = Trainer(scored.run, callbacks=[DescribeEngine()])
    data = ChestXrayDataModule(scored.config)
    module = ViTModule.load_from_checkpoint(checkpoint, config=scored.run)
    match = match_of(module, data, trains=False)  # now: reading the images may take long
    trainer.setup_data(data)
    split = arguments.split or data.default_split()
    records = data.dataset(split).records
    default, levels = scored.folder(checkpoint, split, default=data.default_split())
    out = make_folder(arguments.out, default, levels=levels)  # now: scoring may take long
    origin = {"checkpoint": str(checkpoint), "step": state["step"]}
    origin.update(scored.facts(data, match, state, split))
    print(data.describe(), flush=True)
    trainer.test(module, data, split=split)
    if trainer.is_global_zero:
        outputs = scored.named(trainer.test_outputs)
        print_table(write_report(out, records, outputs, names=outputs.names, origin=origin))
        print(f"report: {out}")
    return 0
