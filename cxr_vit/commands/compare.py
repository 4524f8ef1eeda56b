"""The command `compare`: models on the same images.

python -m cxr_vit compare BASELINE OTHER [OTHER ...] [--out DIR]
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from cxr_vit.cli import COMMANDS, Parser
from cxr_vit.errors import DataError
from cxr_vit.files import make_folder

#: They have letters; fewer resamples give no useful interval, more take hours.
_MOST_MODELS, _RESAMPLES = 26, (100, 100_000)


def compare(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("compare", description=COMMANDS["compare"].summary)
    add = parser.add_argument
    text = (
        "predictions.csv of evaluate.py, or the folder of a report or of a run that has one; the"
        " first is the baseline"
    )
    add("models", nargs="+", type=Path, metavar="PATH", help=text)
    text = "resamples of the patients for intervals and p-values (default: %(default)s)"
    add("--resamples", type=int, default=1000, metavar="N", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of the resamples (default: %(default)s)")
    text = "folder for comparison.json, comparison.csv, comparison.png and comparison.svg"
    add("--out", type=Path, metavar="DIR", help=text)
    arguments = parser.parse(argv)
    if not 2 <= len(arguments.models) <= _MOST_MODELS:
        parser.error(
            f"{len(arguments.models)} given to compare: give the baseline first, and from 1 to"
            f" {_MOST_MODELS - 1} others"
        )
    least, most = _RESAMPLES
    if not least <= arguments.resamples <= most:
        parser.error(f"--resamples {arguments.resamples} is not from {least} to {most}")
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed} is negative")
    files = [_predictions_file(path) for path in arguments.models]
    if arguments.out is not None:
        make_folder(arguments.out, arguments.out)  # now: the resamples may take long

    from cxr_vit.commands.comparison_tables import compare_files

    compare_files(files, arguments.resamples, arguments.seed, arguments.out)
    return 0


def _predictions_file(path: Path) -> Path:
    """Return the file that a path is or has. Raises DataError if there is none."""
    if not path.is_dir():
        if not path.exists():
            raise DataError(
                f"{path}: no such file or folder. Give a predictions.csv, or the folder of a report"
                " or of a run."
            )
        return path
    tried = (path / "predictions.csv", path / "report" / "predictions.csv")
    found = next((each for each in tried if each.is_file()), None)
    if found is None:
        raise DataError(
            f"{path}: the folder has neither predictions.csv nor report/predictions.csv. Score the"
            " run with evaluate.py, or give the folder of its report."
        )
    return found
