"""The command `localize`: whether the maps of a model find the boxes of the findings.

python -m cxr_vit localize RUN [--split test] [--method relevance] [section.key=value ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from cxr_vit.checkpoint_files import checkpoint_of, verify_checkpoint
from cxr_vit.cli import COMMANDS, Parser, importing
from cxr_vit.config.schema import MAP_METHODS
from cxr_vit.data.text_files import check_data_root
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError
from cxr_vit.training.run_folder import config_of_checkpoint


def localize(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("localize", description=COMMANDS["localize"].summary)
    add, text = parser.add_argument, "a checkpoint's folder, or a run's folder: then its best one"
    add("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help=text)
    text = "default: test, or val where the split has no test images; data.split=all: every image"
    add("--split", choices=["train", "val", "test"], help=text)
    text = "what maps are made with (default: %(default)s)"
    add("--method", choices=MAP_METHODS, default=MAP_METHODS[0], help=text)
    text = "score this many of the images with boxes, chosen at random (default: all)"
    add("--images", type=int, metavar="N", help=text)
    text = (
        "images for the sanity check by randomised weights; 0 leaves it out (default: %(default)s)"
    )
    add("--sanity", type=int, default=50, metavar="N", help=text)
    text = "folder for localization.json and localization.png (default: <run>/localization)"
    add("--out", type=Path, metavar="DIR", help=text)
    parser.add_overrides("overrides of the run's configuration (train.py --help lists the fields)")
    arguments = parser.parse(argv)
    if arguments.checkpoint is None:
        parser.error("give the folder of a checkpoint or of a run first")
    if arguments.images is not None and arguments.images < 1:
        parser.error(f"--images {arguments.images}: give 1 or more, or leave it out for all")
    if arguments.sanity < 0:
        parser.error(f"--sanity {arguments.sanity}: give 0 or more")
    if Launch.from_environment().has_others:
        raise ConfigError("localize runs in one process. Start it without torchrun or poprun.")
    checkpoint = checkpoint_of(arguments.checkpoint)
    state = verify_checkpoint(checkpoint, needs_optimizer=False)
    config = config_of_checkpoint(checkpoint, arguments.overrides)
    check_data_root(config.data)

    with importing():
        from cxr_vit.commands.localize_run import Chosen, run_localize

    chosen = Chosen(
        arguments.split, arguments.method, arguments.images, arguments.sanity, arguments.out
    )
    run_localize(checkpoint, state, config, chosen)
    return 0
