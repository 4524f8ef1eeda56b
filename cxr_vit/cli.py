"""Command lines: the table of commands, parsers, exit codes and error output.

A command is imported when it runs, so that `--help` and a mistake on the command line answer at
once. `train.py` and `evaluate.py` are the commands `train` and `evaluate`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib
import logging
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

from cxr_vit import __version__
from cxr_vit.config.files import packaged_configs
from cxr_vit.config.help import help_text
from cxr_vit.config.schema import LISTS, SECTIONS
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError, CxrVitError, suggestion

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
#: `predict` has a row for each image; some could not be read, or pictures are missing.
EXIT_PARTIAL = 3
EXIT_INTERRUPTED = 130
#: A signal stopped the run after it was saved: EX_TEMPFAIL of sysexits.h, "try again".
EXIT_STOPPED = 75
#: The override that evaluate.py takes with --predictions.
OF_PREDICTIONS = "evaluation.resamples"
#: All but newlines, also those that reverse the direction of text or separate lines.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class Command(NamedTuple):
    """A command of `cxr-vit` and `python -m cxr_vit`."""

    summary: str
    #: Module in cxr_vit.commands and its function, which takes words and returns an exit status.
    target: str


COMMANDS = {
    "train": Command("fine-tune a Vision Transformer, or resume a run", "train:main"),
    "evaluate": Command("score a split with a checkpoint and write the report", "evaluate:main"),
    "predict": Command(
        "predict the findings of PNG, JPEG and DICOM files with a checkpoint: a row for each image",
        "predict:predict",
    ),
    "probe": Command(
        "fit a linear probe on the features of the frozen model, in minutes on a CPU", "probe:probe"
    ),
    "summarize": Command(
        "compare runs: mean and standard deviation over the seeds of a recipe, or of several",
        "summarize:summarize",
    ),
    "compare": Command(
        "compare models on the same images: which differences are more than noise",
        "compare:compare",
    ),
    "localize": Command(
        "compare maps of where the model looks with the boxes of NIH's list: pointing game, IoU,"
        " baselines, and a check by randomised weights",
        "localize:localize",
    ),
    "check": Command(
        "validate a configuration; print it, the batch arithmetic and the stages", "check:check"
    ),
    "plan": Command(
        "predict memory and speed of a pipeline, or search for a better one; needs no SDK, no"
        " device and no data",
        "plan:plan",
    ),
    "import-ipu-config": Command(
        "convert Graphcore's files, an IPUConfig or an entry of a configs.yml, to a configuration"
        " overlay; say what each key becomes and why",
        "import_ipu_config:import_ipu_config",
    ),
    "convert-weights": Command(
        "convert weights of PyTorch (.bin, .pth, .pt, .ckpt) to a folder with model.safetensors;"
        " runs no code of the file",
        "convert_weights:convert_weights",
    ),
    "export": Command(
        "export a checkpoint as an ONNX file with its preprocessing, or as a folder for"
        " transformers; compare both",
        "export:export",
    ),
    "prepare": Command(
        "decode and resize all images once, into the cache that training reads", "data:prepare"
    ),
    "sample": Command(
        "write a synthetic data set in NIH's layout, without real images", "data:sample"
    ),
    "data-report": Command(
        "describe the data set, as text and as an HTML page: findings, patients, splits, images"
        " left out; decodes every image, into the cache if one is configured",
        "data:data_report",
    ),
    "selftest": Command(
        "check this installation: versions, devices, decoders, and the numbers that a small model"
        " gives; needs no network and no data",
        "selftest:selftest",
    ),
}


def console() -> NoReturn:
    """Run the command `cxr-vit`."""
    run(main)


def main(argv: Sequence[str]) -> int:
    """Run the command that the first word names; return the exit status."""
    if argv and argv[0] in COMMANDS:
        module, _, function = COMMANDS[argv[0]].target.partition(":")
        command = getattr(importlib.import_module(f"cxr_vit.commands.{module}"), function)
        status: int = command(argv[1:])
        return status
    if argv and argv[0] == "--version":
        print(f"cxr-vit {__version__}")
        return 0
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv:
        print(f"unknown command {argv[0]!r}.{suggestion(argv[0], COMMANDS)}\n", file=sys.stderr)
    print(_usage(), file=sys.stderr)
    return EXIT_USER_ERROR


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}} {command.summary}\n" for name, command in COMMANDS.items()]
    program = _program()
    return (
        f"usage: {program} COMMAND ...\n       {program} --version\n\ncommands:\n{''.join(lines)}"
        f"\n{program} COMMAND --help lists the options of a command."
    )


def _program() -> str:
    return "cxr-vit" if Path(sys.argv[0]).stem == "cxr-vit" else "python -m cxr_vit"


def program(command: str) -> str:
    """Return what to type for a command: as this process was started, or a script of the checkout.

    `cxr-vit train` is advised only to who used `cxr-vit`: it may not be on the path of the others.
    """
    script = Path(__file__).resolve().parents[1] / f"{command}.py"
    if _program() != "cxr-vit" and script.exists():
        return f"python {script.name}"
    return f"{_program()} {command}"


def run(command: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command with the words of the command line and exit with its status.

    A user-facing error is printed without a traceback, and the status is 2. With several processes
    only rank 0 prints output, and only the first rank that fails prints its error.
    """
    # At its end Python would search the objects of all imports for garbage, a second of work.
    atexit.register(gc.freeze)
    handler = logging.StreamHandler()  # to stderr, from WARNING on
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("cxr_vit").setLevel(logging.INFO)
    launch = Launch.from_environment()
    if launch.is_connected:  # torch logs its whole schedule when a process is lost
        logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
    if not launch.is_main:
        sys.stdout = None
        logging.getLogger("cxr_vit").setLevel(logging.ERROR)
    # transformers 4.46 imports a part of torchvision 0.15 that warns of being beta; unused here.
    warnings.filterwarnings("ignore", message="The torchvision.datapoints")
    try:
        status = command(sys.argv[1:])
        if launch.is_connected:
            from cxr_vit.engines.process_group import coordinator

            coordinator(launch).wait_for_all_to_finish()
    except BrokenPipeError:
        # The reader of the output is gone (`| head`); prevent a second error at shutdown.
        sys.stdout = None
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except Exception as error:
        status = _report_error(error, launch) if launch.is_connected else _print_error(error)
    sys.exit(status)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Do not search for garbage while torch and transformers are imported.

    The searches would visit the objects of 3,600 modules again and again. What an import leaves
    stays in use, so that later searches leave it out, too.
    """
    if not gc.isenabled() or "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _report_error(error: Exception, launch: Launch) -> int:
    """Print an error unless another process has already printed one; return the exit status."""
    from cxr_vit.engines.process_group import coordinator

    processes = coordinator(launch)
    if not processes.claim_error_report():
        return EXIT_USER_ERROR
    try:
        return _print_error(error)
    except Exception:
        traceback.print_exc()  # now: torchrun ends this process when the next one ends
        return EXIT_FAILURE
    finally:
        sys.stderr.flush()
        processes.finish_error_report()


def _print_error(error: Exception) -> int:
    """Print a user-facing error; raise any other error again, for its traceback."""
    if not isinstance(error, (CxrVitError, OSError)):  # OSError: a full disk, a read-only folder
        raise error
    for line in printable(str(error)).split("\n"):
        print(f"{type(error).__name__}: {line}", file=sys.stderr)
    return EXIT_USER_ERROR


def printable(text: str) -> str:
    """Escape control characters: text quoted from a file must not give orders to the terminal."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


class _Formatter(logging.Formatter):
    """Formats log messages without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class TrainArguments(NamedTuple):
    """Command line of train.py; `resume` is None, a folder, or "" for the newest run."""

    files: List[Path]
    overrides: List[str]
    resume: Optional[str]
    compile_only: bool


class EvaluateArguments(NamedTuple):
    """Command line of evaluate.py; `files` and their overrides describe another data set.

    There are checkpoints, or `predictions` to score again.
    """

    checkpoints: List[Path]
    split: Optional[str]
    out: Optional[Path]
    overrides: List[str]
    files: List[Path]
    data_overrides: List[str]
    predictions: Optional[Path] = None


class Parser(argparse.ArgumentParser):
    """Parser of one command; a mistake is a ConfigError of one line that says what to write."""

    def __init__(self, command: str, *, description: str, epilog: Optional[str] = None) -> None:
        super().__init__(
            program(command),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    @property
    def options(self) -> List[str]:
        """The options, e.g. `--config`."""
        return list(self._option_string_actions)

    def add_overrides(self, text: str) -> None:
        """Let the command take `section.key=value`."""
        self.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the words of the command line, options and overrides in any order."""
        problems = list(_misspelt_overrides(argv, self.options))
        if problems:
            raise ConfigError("\n".join(problems))
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError, in place of printing the usage and exiting."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        near = suggestion(unknown.group(1), self.options) if unknown else ""
        raise ConfigError(f"{message}.{near} ({self.prog} --help lists the options.)")


def config_parser(command: str, *, description: str) -> Parser:
    """Make a parser with `--config` and overrides, whose help lists every field."""
    parser = Parser(
        command, description=description, epilog="sections and fields:\n\n" + help_text()
    )
    text = (
        "YAML files, merged left to right; those of the package by name: "
        f"{', '.join(packaged_configs())}. data/* and recipes/pod4 go behind one of the others"
    )
    add = parser.add_argument
    add("--config", nargs="+", action="extend", default=[], metavar="FILE", help=text)
    parser.add_overrides("overrides, win over every file")
    return parser


def files_and_overrides(arguments: argparse.Namespace) -> Tuple[List[Path], List[str]]:
    """Return the configuration files and the overrides of a command line of `config_parser`."""
    for word in arguments.overrides:
        if "=" not in word and Path(word).suffix in (".yaml", ".yml"):
            raise ConfigError(f"{word}: a configuration file is given as --config {word}")
    files, overrides = split_overrides(arguments.config)
    return files, [*overrides, *arguments.overrides]


def split_overrides(words: Sequence[str]) -> Tuple[List[Path], List[str]]:
    """Separate paths from overrides, for `--config a.yaml optim.lr=1e-4`."""
    paths = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    return paths, overrides


def _misspelt_overrides(argv: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    """Yield a message for each override that is written like an option: `--optim.lr 1e-3`."""
    fields = [f"{name}.{key}" for name in SECTIONS for key in SECTIONS[name].model_fields]
    for word, following in zip(argv, [*argv[1:], ""]):
        given, equals, value = word.partition("=")
        if not given.startswith("-") or given in options:
            continue
        key = given.lstrip("-").replace("-", "_")
        is_field = key.partition(".")[0] in SECTIONS or key in LISTS
        keys = [key] if is_field else [field for field in fields if field.split(".")[1] == key]
        if keys:
            if not equals and not following.startswith("-") and "=" not in following:
                value = following
            overrides = " or ".join(f"{key}={value or 'value'}" for key in keys)
            yield f"{given} is no option. Write {overrides}, without dashes."


def train_arguments(argv: Sequence[str]) -> TrainArguments:
    """Parse the command line of train.py."""
    parser = config_parser("train", description="Fine-tune a Vision Transformer on chest X-rays.")
    text = (
        "resume from the last checkpoint of this run folder, else of run.dir, else of the newest"
        " run named run.name; the run's own config.yaml applies, overrides win over it"
    )
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN", help=text)
    text = (
        "compile the graphs for IPUs into engine.executable_cache and stop: needs the Poplar SDK,"
        " but no IPU and no data"
    )
    parser.add_argument("--compile-only", action="store_true", help=text)
    if not argv:
        raise ConfigError(
            f"no configuration. Give one, e.g. {parser.prog} --config vit_demo, or --resume a run."
            f" The package has {', '.join(packaged_configs())}."
        )
    namespace = parser.parse(argv)
    files, overrides = files_and_overrides(namespace)
    resume = namespace.resume
    if resume and "=" in resume and not Path(resume).exists():
        resume, overrides = "", [resume, *overrides]  # `--resume train.epochs=5`
    if resume is not None and namespace.compile_only:
        parser.error("--compile-only makes no run, so there is none to --resume")
    return TrainArguments(files, overrides, resume, namespace.compile_only)


def evaluate_arguments(argv: Sequence[str]) -> EvaluateArguments:
    """Parse the command line of evaluate.py."""
    parser = Parser("evaluate", description="Score a split with a checkpoint and write the report.")
    add, text = (
        parser.add_argument,
        "a checkpoint's folder, or a run's folder: then its best one. Of several the probabilities"
        " are averaged",
    )
    add("--checkpoint", nargs="+", action="extend", default=[], metavar="DIR", help=text)
    text = (
        "compute all scores again from a predictions.csv that evaluate.py wrote, without model or"
        " images"
    )
    add("--predictions", type=Path, metavar="FILE", help=text)
    text = "default: test, or val where the split has no test images"
    add("--split", choices=["train", "val", "test"], help=text)
    packaged = ", ".join(name for name in packaged_configs() if name.startswith("data/"))
    text = (
        "score another data set, every image of it unless --split is given: YAML files with its"
        f" data section; those of the package by name: {packaged or 'none'}"
    )
    add("--data", nargs="+", action="extend", default=[], metavar="FILE", help=text)
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: <run>/report, of several checkpoints <run>/report-ensemble in the first's"
        " run; with --data, its <name>; with --predictions, recomputed/ beside the file",
    )
    parser.add_overrides(
        "overrides of the run's configuration; with --data, those of data.* apply to the other data"
        " set (train.py --help lists the fields)"
    )
    if argv and "=" not in argv[0] and not argv[0].startswith("-"):
        what = "predictions are" if argv[0].endswith(".csv") else "a checkpoint or a run is"
        option = "--predictions" if argv[0].endswith(".csv") else "--checkpoint"
        raise ConfigError(f"{argv[0]}: {what} given as {option} {argv[0]}")
    given = parser.parse(argv)
    if given.predictions is not None:
        return _predictions_arguments(given)
    if not given.checkpoint:
        parser.error("the following arguments are required: --checkpoint, or --predictions")
    first, *others = given.checkpoint
    checkpoints, after = split_overrides(others)
    files, more = split_overrides(given.data)
    overrides = sorted([*after, *more, *given.overrides], key=list(argv).index)
    if given.data and not files:
        raise ConfigError(f"--data {more[0]}: give a YAML file with the data section first.")
    of_data = [text for text in overrides if files and text.startswith(("data.", "data="))]
    of_run = [text for text in overrides if text not in of_data]
    checkpoints = [Path(first), *checkpoints]
    return EvaluateArguments(checkpoints, given.split, given.out, of_run, files, of_data)


def _predictions_arguments(given: argparse.Namespace) -> EvaluateArguments:
    """Return the arguments with --predictions; ConfigError for what has no effect with it."""
    others = {"--checkpoint": given.checkpoint, "--data": given.data, "--split": given.split}
    for option, value in others.items():
        if value:
            raise ConfigError(
                f"{option} has no effect with --predictions, which scores the rows of the file."
                " Give one of the two."
            )
    for text in given.overrides:
        if text.partition("=")[0] != OF_PREDICTIONS:
            raise ConfigError(
                f"{text}: with --predictions only {OF_PREDICTIONS} has an effect. Leave it out."
            )
    return EvaluateArguments([], None, given.out, given.overrides, [], [], given.predictions)
