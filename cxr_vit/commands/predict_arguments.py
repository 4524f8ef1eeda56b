"""The command line of `predict`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from cxr_vit.cli import COMMANDS, Parser, split_overrides
from cxr_vit.config.schema import MAP_METHODS
from cxr_vit.errors import ConfigError

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
    saliency: Optional[Path]
    saliency_method: str
    findings: List[str]
    overrides: List[str]


def _parser() -> Parser:
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
    text = (
        "write pictures: each image, and beside it the same with a map of what the probability of a"
        " finding rests on, for each of its findings, else for the one with the highest probability"
    )
    add("--saliency", type=Path, metavar="DIR", help=text)
    text = "how --saliency computes the map (default: %(default)s)"
    add("--saliency-method", choices=MAP_METHODS, default=MAP_METHODS[0], help=text)
    text = "findings that --saliency shows of every image, in place of its own"
    add("--findings", nargs="+", action="extend", default=[], metavar="NAME", help=text)
    return parser


def predict_arguments(argv: Sequence[str]) -> PredictArguments:
    """Parse the command line."""
    parser = _parser()
    try:
        given = parser.parse(argv)
    except ConfigError as error:
        greedy = [option for option in ("--keep-tags", "--findings") if option in argv]
        if not greedy or "required: " not in str(error):
            raise
        text = f"{greedy[0]} takes all words up to the next option: put CHECKPOINT and PATH first."
        raise ConfigError(f"{error} {text}") from error
    if given.saliency is None and (given.findings or given.saliency_method != MAP_METHODS[0]):
        raise ConfigError("--findings and --saliency-method are for pictures. Add --saliency DIR.")
    paths, overrides = split_overrides(given.paths)
    if not paths:
        parser.error("no image is given: give files, folders or a list")
    _refuse_inside(given, paths)
    return PredictArguments(
        *(given.checkpoint, paths, given.out, _format(given), given.resume),
        *(given.operating_point, list(dict.fromkeys(given.keep_tags))),
        *(given.preprocess_check, given.saliency, given.saliency_method),
        *(list(dict.fromkeys(given.findings)), overrides),
    )


def _refuse_inside(given: argparse.Namespace, paths: Sequence[Path]) -> None:
    """Raise ConfigError for a folder of pictures that would be predicted themselves."""
    for option, folder in (
        ("--preprocess-check", given.preprocess_check),
        ("--saliency", given.saliency),
    ):
        if folder is not None and _is_inside(folder, paths):
            raise ConfigError(
                f"{option} {folder} is in a folder whose images are predicted: its pictures would"
                " be, too, with --resume. Give another folder."
            )


def _is_inside(folder: Path, paths: Sequence[Path]) -> bool:
    above = {folder.resolve(), *folder.resolve().parents}
    folders = filter(os.path.isdir, paths)  # False where looking at it is not permitted
    return any(path.resolve() in above for path in folders)


def _format(given: argparse.Namespace) -> str:
    """Return the format; ConfigError for options that exclude each other."""
    if given.out is None:
        if given.resume:
            raise ConfigError("--resume continues a file. Give it as --out FILE.")
        return given.format or "table"
    if given.format == "table":
        raise ConfigError("--format table is for the terminal. Leave it out, or leave --out out.")
    return given.format or ("jsonl" if given.out.suffix == ".jsonl" else "csv")


def options_of(arguments: PredictArguments) -> Dict[str, Any]:
    """Return the options that the rows of an output and the pictures beside them depend on."""
    saliency = arguments.saliency and {
        "pictures": str(arguments.saliency),
        "method": arguments.saliency_method,
        "findings": arguments.findings,
    }
    return {
        "paths": list(map(str, arguments.paths)),
        "folder": str(Path.cwd()),
        "format": arguments.format,
        "operating_point": arguments.operating_point,
        "keep_tags": arguments.keep_tags,
        "preprocess_check": arguments.preprocess_check and str(arguments.preprocess_check),
        "saliency": saliency,
    }
