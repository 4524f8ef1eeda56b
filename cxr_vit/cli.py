"""What the command lines share: arguments, log lines, and errors without a traceback.

Imports no torch: `--help` and a configuration error answer at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Callable, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

from cxr_vit.config.help import help_text
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import CxrVitError

__all__ = [
    "EvaluateArguments",
    "TrainArguments",
    "config_parser",
    "evaluate_arguments",
    "read_config",
    "run",
    "train_arguments",
]

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
#: A signal stopped the run after it was saved; EX_TEMPFAIL of sysexits.h, "try again".
EXIT_STOPPED = 75


class TrainArguments(NamedTuple):
    """The command line of train.py; `resume` is None, a folder, or "" for the newest run."""

    files: List[Path]
    overrides: List[str]
    resume: Optional[str]
    compile_only: bool


class EvaluateArguments(NamedTuple):
    """The command line of evaluate.py."""

    checkpoint: Path
    split: Optional[str]
    out: Optional[Path]
    overrides: List[str]


def config_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Make a parser with `--config` and overrides, whose help lists every field."""
    parser = argparse.ArgumentParser(
        program,
        description=description,
        epilog="sections and fields:\n\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        nargs="+",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML files, merged left to right",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="overrides, win over every file"
    )
    return parser


def _split_overrides(words: Sequence[str]) -> Tuple[List[Path], List[str]]:
    """Tell files from overrides: `--config a.yaml optim.lr=1e-4` reads as a person means it."""
    files = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    return files, overrides


def read_config(namespace: argparse.Namespace) -> Tuple[List[Path], List[str]]:
    """Return the files and the overrides of a parsed command line."""
    files, more = _split_overrides([word for words in namespace.config for word in words])
    return files, [*more, *namespace.overrides]


def train_arguments(argv: Sequence[str]) -> TrainArguments:
    """Parse the command line of train.py."""
    parser = config_parser("train.py", "Fine-tune a Vision Transformer on chest X-rays.")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        default=None,
        metavar="RUN",
        help="go on from the last checkpoint of this run's folder, else of run.dir, else of the"
        " newest run named run.name; the run's own config.yaml holds, overrides win over it",
    )
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="compile the graphs for IPUs into engine.executable_cache and stop: needs the Poplar"
        " SDK, but no IPU and no data",
    )
    namespace = parser.parse_intermixed_args(argv)
    files, overrides = read_config(namespace)
    resume = namespace.resume
    if resume and "=" in resume and not Path(resume).exists():
        resume, overrides = "", [resume, *overrides]  # `--resume train.epochs=5`
    if resume is not None and namespace.compile_only:
        parser.error("--compile-only makes no run, so there is none to --resume")
    return TrainArguments(files, overrides, resume, namespace.compile_only)


def evaluate_arguments(argv: Sequence[str]) -> EvaluateArguments:
    """Parse the command line of evaluate.py."""
    parser = argparse.ArgumentParser(
        "evaluate.py",
        description="Score a split with a checkpoint and write the report.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="e.g. runs/<name>/checkpoints/best",
    )
    parser.add_argument(
        "--split",
        choices=["train", "val", "test"],
        help="default: test, or val where the split has no test images",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: <run>/report")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="overrides of the run's configuration (train.py --help lists the fields)",
    )
    namespace = parser.parse_intermixed_args(argv)
    return EvaluateArguments(
        namespace.checkpoint, namespace.split, namespace.out, namespace.overrides
    )


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command; print a user's mistake without a traceback and exit with status 2.

    Of several processes only the first prints, but an error is told by the one that it befell.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("cxr_vit").setLevel(logging.INFO)
    launch = Launch.from_environment()
    if launch.is_connected:  # it prints its whole schedule where a process is lost
        logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
    if not launch.is_main:
        sys.stdout = None
        logging.getLogger("cxr_vit").setLevel(logging.ERROR)
    # transformers 4.46 imports a part of torchvision 0.15 that calls itself beta; unused here.
    warnings.filterwarnings("ignore", message="The torchvision.datapoints")
    try:
        status = main(sys.argv[1:])
        if launch.is_connected:
            from cxr_vit.engines.process_group import leave_last

            leave_last()
    except BrokenPipeError:
        # The reader of our output went away (`| head`); leave no second error at shutdown.
        sys.stdout = None
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except Exception as error:
        status = _tell(error) if launch.is_connected else _print_error(error)
    sys.exit(status)


def _tell(error: Exception) -> int:
    """Print an error, if no other process has told one before; return the exit status."""
    from cxr_vit.engines.process_group import speaks_for_all, spoken_for_all

    if not speaks_for_all():
        return EXIT_USER_ERROR
    try:
        return _print_error(error)
    except Exception:
        traceback.print_exc()  # now: torchrun ends this process when the next one ends
        return EXIT_FAILURE
    finally:
        sys.stderr.flush()
        spoken_for_all()


def _print_error(error: Exception) -> int:
    """Print a message for a user's mistake; raise anything else again, for its traceback."""
    lines = str(error).split("\n")
    name = type(error).__name__
    if isinstance(error, RuntimeError) and lines[0].startswith("DataLoader worker"):
        name = "DataError"
        lines.append(
            "Out of memory, or of /dev/shm? Lower data.num_workers and go on with --resume."
        )
    elif not isinstance(error, (CxrVitError, OSError)):  # a full disk, a folder not to be written
        raise error
    for line in lines:
        print(f"{name}: {line}", file=sys.stderr)
    return EXIT_USER_ERROR
