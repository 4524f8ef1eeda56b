"""The command `predict`: probabilities of image files.

python -m cxr_vit predict runs/<name> folder image.png study.dcm list.csv [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

from cxr_vit.checkpoint_files import checkpoint_of, verify_checkpoint
from cxr_vit.cli import COMMANDS, Parser, importing, split_overrides
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError
from cxr_vit.training.run_folder import config_of_checkpoint

#: The kinds of `cxr_vit.evaluation.operating_points`.
_KINDS = ("youden", "f1", "specificity_95", "sensitivity_95")
_FORMATS = ("table", "csv", "jsonl")


class PredictArguments(NamedTuple):
    """Command line of `predict`; `format` is one of `_FORMATS`."""

    checkpoint: Path
    paths: List[Path]
    out: Optional[Path]
    format: str
    resume: bool
    operating_point: str
    keep_tags: List[str]
    preprocess_check: Optional[Path]
    overrides: List[str]


def predict_arguments(argv: Sequence[str]) -> PredictArguments:
    """Parse the command line."""
    parser = Parser(
        "predict",
        description=f"{COMMANDS['predict'].summary}. For research only: no medical device.",
    )
    add, text = (
        parser.add_argument,
        "a checkpoint's folder, a run's folder (then its best one), or a model.onnx of `export`",
    )
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=text)
    text = (
        "PNG, JPEG and DICOM files; folders of them; a table (.csv, .tsv, .parquet) with a column"
        " of paths, or a .txt with one a line, relative to the file's folder. section.key=value"
        " overrides the run's configuration (train.py --help lists the fields)"
    )
    add("paths", nargs="+", metavar="PATH", help=text)
    text = "file of rows, CSV or (.jsonl) JSON lines; default: a table on the terminal"
    add("--out", type=Path, metavar="FILE", help=text)
    text = "default: csv or jsonl by the name of --out, table without it"
    add("--format", choices=_FORMATS, help=text)
    text = "continue --out after an interruption; images that are in it are not read again"
    add("--resume", action="store_true", help=text)
    text = "thresholds of the findings (default: %(default)s)"
    add("--operating-point", choices=_KINDS, default=_KINDS[0], help=text)
    text = (
        "write these tags of DICOM files, e.g. PatientID StudyDate; without it nothing that a file"
        " says of the patient is written"
    )
    add("--keep-tags", nargs="+", action="extend", default=[], metavar="KEYWORD", help=text)
    text = "write what the model sees of each image, as PNG files"
    add("--preprocess-check", type=Path, metavar="DIR", help=text)
    given = parser.parse(argv)
    paths, overrides = split_overrides(given.paths)
    if not paths:
        parser.error("no image is given: give files, folders or a list")
    return PredictArguments(
        *(given.checkpoint, paths, given.out, _format(given), given.resume),
        *(given.operating_point, list(dict.fromkeys(given.keep_tags))),
        *(given.preprocess_check, overrides),
    )


def _format(given: argparse.Namespace) -> str:
    """Return the format; ConfigError for options that exclude each other."""
    if given.out is None:
        if given.resume:
            raise ConfigError("--resume continues a file. Give it as --out FILE.")
        return given.format or "table"
    if given.format == "table":
        raise ConfigError("--format table is for the terminal. Leave it out, or leave --out out.")
    return given.format or ("jsonl" if given.out.suffix == ".jsonl" else "csv")


def predict(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = predict_arguments(argv)
    launch = Launch.from_environment()
    # Standard output has the rows and nothing else.
    own = contextlib.redirect_stdout(sys.stderr) if launch.is_main else contextlib.nullcontext()
    target = sys.stdout
    with contextlib.ExitStack() as stack:
        stack.enter_context(own)
        opening = _opening(arguments, launch)

        with importing():
            from cxr_vit.commands.predict_run import PredictRun, watchers_of
            from cxr_vit.data.dicom_header import check_keywords
            from cxr_vit.prediction.inputs import find_inputs
            from cxr_vit.prediction.outputs import refuse_existing

        check_keywords(arguments.keep_tags)
        if arguments.out is not None and launch.is_main:
            refuse_existing(arguments.out, resumes=arguments.resume)
        inputs = find_inputs(arguments.paths)
        opened = stack.enter_context(opening())
        run = PredictRun(opened, inputs, arguments, target)
        return run.run(watchers_of(arguments, opened))


def _opening(arguments: PredictArguments, launch: Launch) -> Callable[[], Any]:
    """Check the checkpoint; return what opens it."""
    path = arguments.checkpoint
    exported = path if path.suffix == ".onnx" else path / "model.onnx"
    if exported.is_file() and not (path / "trainer_state.json").exists():
        return lambda: _open_exported(exported, arguments, launch)
    checkpoint = checkpoint_of(path)
    state = verify_checkpoint(checkpoint, needs_optimizer=False)
    config = config_of_checkpoint(checkpoint, arguments.overrides)

    def open_it() -> Any:
        from cxr_vit.commands.checkpoint_predictor import open_checkpoint

        return open_checkpoint(checkpoint, state, config)

    return open_it


@contextlib.contextmanager
def _open_exported(path: Path, arguments: PredictArguments, launch: Launch) -> Iterator[Any]:
    """Open an exported model, which has no configuration and runs in one process."""
    from cxr_vit.commands.checkpoint_predictor import Opened
    from cxr_vit.prediction.onnx_model import (  # type: ignore[import-not-found,unused-ignore]
        open_onnx,
    )

    if arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]} has no effect on {path}. Leave it out.")
    if launch.has_others:
        raise ConfigError(f"{path} runs in one process. Start the command without a launcher.")
    yield Opened(open_onnx(path))


def options_of(arguments: PredictArguments) -> Dict[str, Any]:
    """Return the options that the rows of an output depend on."""
    return {
        "paths": list(map(str, arguments.paths)),
        "folder": str(Path.cwd()),
        "format": arguments.format,
        "operating_point": arguments.operating_point,
        "keep_tags": arguments.keep_tags,
    }
