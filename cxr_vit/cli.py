"""What the command lines share: arguments, log lines, and errors without a traceback.

Imports no torch: `--help` and a configuration error answer at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Callable, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

from cxr_vit.config.explain import help_text
from cxr_vit.errors import CxrVitError
from cxr_vit.training.run_folder import is_main_process

__all__ = [
    "EvaluateArguments",
    "TrainArguments",
    "config_parser",
    "evaluate_arguments",
    "read_config",
    "run",
    "train_arguments",
]

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
        help="default: test, or val where the split has no test films",
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
    """Run a command; print a user's mistake without a traceback and exit with status 2."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("cxr_vit").setLevel(logging.INFO)
    if not is_main_process():  # the first of several processes speaks for all
        sys.stdout = None
        logging.getLogger("cxr_vit").setLevel(logging.ERROR)
    # transformers 4.46 imports a part of torchvision 0.15 that calls itself beta; unused here.
    warnings.filterwarnings("ignore", message="The torchvision.datapoints")
    try:
        status = main(sys.argv[1:])
    except CxrVitError as error:
        for line in str(error).split("\n"):
            print(f"{type(error).__name__}: {line}", file=sys.stderr)
        status = EXIT_USER_ERROR
    except BrokenPipeError:
        # The reader of our output went away (`| head`); leave no second error at shutdown.
        sys.stdout = None
        status = EXIT_USER_ERROR
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = EXIT_USER_ERROR
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        print(
            f"DataError: {error}\nDataError: Out of memory, or of /dev/shm? Lower data.num_workers"
            " and go on with --resume.",
            file=sys.stderr,
        )
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    sys.exit(status)
