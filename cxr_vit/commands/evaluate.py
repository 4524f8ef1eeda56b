"""Score a split, or another data set, with a checkpoint and the configuration of its run.

python evaluate.py --checkpoint runs/<name> [--split test] [--out DIR]
python evaluate.py --checkpoint runs/<name> runs/<other> ...    an ensemble
python evaluate.py --checkpoint runs/<name> --data other.yaml [data.key=value ...]
python evaluate.py --predictions runs/<name>/report/predictions.csv    no model, no images
"""

from __future__ import annotations

from typing import Sequence

from cxr_vit.checkpoint_files import checkpoint_of, verify_checkpoint
from cxr_vit.cli import evaluate_arguments, importing
from cxr_vit.commands.scored_data import scored_data
from cxr_vit.data.text_files import check_data_root
from cxr_vit.files import make_folder
from cxr_vit.training.run_folder import config_of_checkpoint


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = evaluate_arguments(argv)
    found = []
    for checkpoint in map(checkpoint_of, arguments.checkpoints):
        state = verify_checkpoint(checkpoint, needs_optimizer=False)
        scored = scored_data(config_of_checkpoint(checkpoint, arguments.overrides), arguments)
        check_data_root(scored.config.data)
        found.append((checkpoint, state, scored))

    with importing():
        from cxr_vit.commands.fitted_points import operating_points_of
        from cxr_vit.commands.given_predictions import score_predictions, show_report
        from cxr_vit.commands.members import Members
        from cxr_vit.evaluation.report import refuse_other_files

    if arguments.predictions is not None:
        return score_predictions(arguments.predictions, arguments.out, arguments.overrides)
    members = Members(found)
    split = members.set_up(arguments.split)
    default, levels = members.folder(split)
    out = make_folder(arguments.out, default, levels=levels)  # now: scoring may take long
    refuse_other_files(out)
    members.describe(split)
    predictions = members.predictions(split)
    points = operating_points_of(members, out, predictions)
    if members.is_main:
        context = members.context(split)
        show_report(out, predictions, members.config, context, members.origin(), points)
    return 0
