"""The command `probe`: a linear probe on the features of the frozen model.

python -m cxr_vit probe --config X [section.key=value ...]
"""

from __future__ import annotations

from typing import Sequence

from cxr_vit.cli import COMMANDS, config_parser, files_and_overrides, program
from cxr_vit.config import load_config


def probe(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = config_parser("probe", description=COMMANDS["probe"].summary)
    config = load_config(*files_and_overrides(parser.parse(argv)))

    from cxr_vit.commands.probe_run import run_probe

    folder = run_probe(config)
    print(f"run: {folder}\nnext: {program('evaluate')} --checkpoint {folder}")
    return 0
