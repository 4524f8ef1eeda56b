"""The command `export`: a checkpoint as an ONNX file, or as a folder for transformers.

python -m cxr_vit export CHECKPOINT --to onnx|hf [--out DIR] [section.key=value ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from cxr_vit.checkpoint_files import checkpoint_of, run_of_checkpoint, verify_checkpoint
from cxr_vit.cli import COMMANDS, Parser, importing
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError
from cxr_vit.files import make_folder
from cxr_vit.training.run_folder import config_of_checkpoint


def export(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("export", description=COMMANDS["export"].summary)
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint's folder, or a run's folder: then its best one",
    )
    text = "an ONNX file with its preprocessing, or a folder that transformers loads"
    add("--to", choices=["onnx", "hf"], required=True, help=text)
    add("--out", type=Path, metavar="DIR", help="default: <run>/export-onnx or <run>/export-hf")
    text = "the images that are compared; default: val, or test where there are no val images"
    add("--split", choices=["val", "test"], help=text)
    text = "compare this many images of the split, evenly spaced; default: all"
    add("--images", type=int, metavar="N", help=text)
    parser.add_overrides("overrides of the run's configuration (train.py --help lists the fields)")
    given = parser.parse(argv)
    if given.images is not None and given.images < 1:
        parser.error(f"--images {given.images}: compare one image or more")
    if Launch.from_environment().has_others:  # they would write the same files
        raise ConfigError("export runs in one process. Start the command without a launcher.")
    checkpoint = checkpoint_of(given.checkpoint)
    state = verify_checkpoint(checkpoint, needs_optimizer=False)
    config = config_of_checkpoint(checkpoint, given.overrides)
    with importing():
        from cxr_vit.commands.export_run import (
            Source,
            check_can_write,
            images_of,
            write_hub,
            write_onnx,
        )
        from cxr_vit.prediction.manifest import refuse_other_files

    source = Source(checkpoint, state, config)
    check_can_write(source, given.to)
    write = write_onnx if given.to == "onnx" else write_hub
    default = (run_of_checkpoint(checkpoint) or checkpoint) / f"export-{given.to}"
    out = make_folder(given.out, default, what="the export")
    refuse_other_files(out, given.to)
    write(source, out, images_of(config, given.split, given.images))
    return 0
