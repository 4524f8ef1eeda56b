"""Command lines: parsers, the commands of `python -m cxr_vit`, exit codes and error output.

Each command imports what it needs when it runs, so that `--help` and a configuration error answer
at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Callable,
    Dict,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
)

from cxr_vit.config import BatchPlan, Config, check, dump_config, load_config
from cxr_vit.config.help import help_text
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.plans import StagePlan
from cxr_vit.config.rules import describe_processes
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError, CxrVitError, did_you_mean

if TYPE_CHECKING:
    from cxr_vit.planner.calibrate import Calibration
    from cxr_vit.planner.estimate import Plan
    from cxr_vit.planner.speed import SpeedModel

__all__ = [
    "COMMANDS",
    "EvaluateArguments",
    "TrainArguments",
    "config_parser",
    "evaluate_arguments",
    "main",
    "read_config",
    "run",
    "train_arguments",
]

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
#: A signal stopped the run after it was saved: EX_TEMPFAIL of sysexits.h, "try again".
EXIT_STOPPED = 75


def run(command: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command with the words of the command line and exit with its status.

    A user-facing error is printed without a traceback, and the status is 2. With several processes
    only rank 0 prints output, and only the first rank that fails prints its error.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
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
            from cxr_vit.engines.process_group import leave_last

            leave_last()
    except BrokenPipeError:
        # The reader of the output is gone (`| head`); prevent a second error at shutdown.
        sys.stdout = None
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except Exception as error:
        status = _report_error(error) if launch.is_connected else _print_error(error)
    sys.exit(status)


def _report_error(error: Exception) -> int:
    """Print an error unless another process has already printed one; return the exit status."""
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
    """Print a user-facing error; raise any other error again, for its traceback."""
    name, lines = type(error).__name__, str(error).split("\n")
    if _is_dead_loader_worker(error):
        name = "DataError"
        lines.append(
            "Out of memory, or of /dev/shm? Lower data.num_workers and continue with --resume."
        )
    elif not isinstance(error, (CxrVitError, OSError)):  # OSError: a full disk, a read-only folder
        raise error
    for line in lines:
        print(f"{name}: {line}", file=sys.stderr)
    return EXIT_USER_ERROR


def _is_dead_loader_worker(error: Exception) -> bool:
    """Whether a loader process was killed: torch raises a plain RuntimeError, known by its text."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


# Arguments of train.py, evaluate.py and the commands


class TrainArguments(NamedTuple):
    """Command line of train.py; `resume` is None, a folder, or "" for the newest run."""

    files: List[Path]
    overrides: List[str]
    resume: Optional[str]
    compile_only: bool


class EvaluateArguments(NamedTuple):
    """Command line of evaluate.py."""

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


def read_config(arguments: argparse.Namespace) -> Tuple[List[Path], List[str]]:
    """Return the configuration files and the overrides of a parsed command line."""
    files, overrides = _split_overrides([word for words in arguments.config for word in words])
    return files, [*overrides, *arguments.overrides]


def _split_overrides(words: Sequence[str]) -> Tuple[List[Path], List[str]]:
    """Separate paths from overrides, for `--config a.yaml optim.lr=1e-4`."""
    paths = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    return paths, overrides


def train_arguments(argv: Sequence[str]) -> TrainArguments:
    """Parse the command line of train.py."""
    parser = config_parser("train.py", "Fine-tune a Vision Transformer on chest X-rays.")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        default=None,
        metavar="RUN",
        help="resume from the last checkpoint of this run folder, else of run.dir, else of the"
        " newest run named run.name; the run's own config.yaml applies, overrides win over it",
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


# python -m cxr_vit sample, check, prepare, data-report


def _sample_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        description="Write a synthetic data set in NIH ChestX-ray14's layout, without real images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="number of images")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="side of an image")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data set")
    return parser


def _sample(arguments: argparse.Namespace) -> int:
    from cxr_vit.synthetic.dataset import write_sample

    count = write_sample(
        arguments.out, num_images=arguments.images, image_size=arguments.size, seed=arguments.seed
    )
    print(f"{count} synthetic images in {arguments.out}; use them with data.root={arguments.out}")
    return 0


def _check_parser(program: str) -> argparse.ArgumentParser:
    return config_parser(program, "Validate a configuration and print what it means.")


def _check(arguments: argparse.Namespace) -> int:
    from cxr_vit.planner.estimate import describe_memory, preflight

    config = check(load_config(*read_config(arguments)))
    print(dump_config(config))
    print("\n".join(BatchPlan.from_section(config.batch).describe()))
    print("\n".join(StagePlan.from_list(config.pipeline.layers_per_stage).describe()))
    print(describe_processes(config))
    refused = ipu_problems(config)
    if refused:
        print("on IPUs      refused by PopTorch:", *refused, sep="\n  ")
    else:
        print("on IPUs      nothing here that PopTorch would refuse")
    print(f"on IPUs      {describe_memory(config)}")
    if config.planner.strict:
        preflight(config, config.engine.name)
    return 0


def _prepare_parser(program: str) -> argparse.ArgumentParser:
    parser = config_parser(
        program, "Decode and resize all images of the CSV once, into the cache that training reads."
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check every image of the cache, by its checksum and against its file",
    )
    return parser


def _prepare(arguments: argparse.Namespace) -> int:
    from cxr_vit.data.datamodule import prepare, verify_cache
    from cxr_vit.synthetic.dataset import write_sample_if_absent

    data = check(load_config(*read_config(arguments))).data
    if arguments.verify:
        print(verify_cache(data))
    else:
        write_sample_if_absent(data)
        print(prepare(data))
    return 0


def _data_report_parser(program: str) -> argparse.ArgumentParser:
    parser = config_parser(
        program,
        "Describe the data set, as text and as one HTML page with figures and sample images. Every"
        " image is decoded first, into the cache if one is configured.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data_report.html"),
        metavar="FILE",
        help="the page; default: data_report.html",
    )
    return parser


def _data_report(arguments: argparse.Namespace) -> int:
    from cxr_vit.data.datamodule import ChestXrayDataModule
    from cxr_vit.dataset_report.report import write_data_report
    from cxr_vit.synthetic.dataset import write_sample_if_absent

    data = check(load_config(*read_config(arguments))).data
    write_sample_if_absent(data)
    # The report lists missing and unusable images, so neither may stop it.
    lenient = data.model_copy(update={"on_missing": "skip", "on_bad_image": "skip"})
    print(write_data_report(ChestXrayDataModule(lenient), arguments.out))
    print(f"page: {arguments.out}")
    return 0


# python -m cxr_vit plan


def _plan_parser(program: str) -> argparse.ArgumentParser:
    parser = config_parser(
        program,
        "Predict memory, time and speed of a pipeline before renting the machine. It needs no SDK,"
        " no IPU and no data.",
    )
    parser.add_argument(
        "--hardware",
        choices=["mk2", "bow", "gpu"],
        help="the device planned for; default: planner.hardware",
    )
    parser.add_argument(
        "--images",
        type=_number,
        metavar="N",
        help="training images per epoch; default: as in the training list, else as in NIH's",
    )
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="draw timeline and memory into this folder, as PNG and SVG",
    )
    parser.add_argument(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="RUN",
        help="fit the constants of the speed model to runs of your own; without --config, plan the"
        " first of them",
    )
    parser.add_argument(
        "--search", action="store_true", help="search for faster cuts, batches and recomputations"
    )
    for name in ("micro-batches", "accumulations"):
        parser.add_argument(
            f"--{name}", type=_numbers, metavar="N,N,...", help=f"the {name} that --search tries"
        )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write the best result of --search to a file that overrides the configuration",
    )
    parser.add_argument("--sources", action="store_true", help="list every number with its source")
    return parser


def _number(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of 1 or more")
    return int(text)


def _numbers(text: str) -> List[int]:
    return sorted({_number(word) for word in text.split(",")})


def _plan(arguments: argparse.Namespace) -> int:
    from cxr_vit.planner.calibrate import calibration_lines
    from cxr_vit.planner.estimate import choose_hardware, make_plan
    from cxr_vit.planner.report import plan_lines, source_lines

    _check_plan_arguments(arguments)
    files, overrides = read_config(arguments)
    folders, more = _split_overrides(arguments.calibrate)
    overrides += more
    config, calibration = _configure_plan(arguments, files, overrides, folders)
    if arguments.sources:
        print(*source_lines(choose_hardware(config)), sep="\n")
        return 0
    if calibration:
        print(*calibration_lines(calibration), "", sep="\n")
    model = calibration.after if calibration else None
    if arguments.search:
        sources = files or [folder / "config.yaml" for folder in folders[:1]]
        _search(arguments, config, model, sources, overrides)
        return 0
    plan = make_plan(config, model=model, images=arguments.images)
    print(*plan_lines(config, plan), sep="\n")
    if arguments.figures:
        _draw(plan, arguments.figures)
    return 0


def _check_plan_arguments(arguments: argparse.Namespace) -> None:
    for name in ("write", "micro_batches", "accumulations"):
        if getattr(arguments, name) and not arguments.search:
            raise ConfigError(f"--{name.replace('_', '-')} needs --search. Give both or neither.")
    if arguments.search and arguments.images:
        raise ConfigError("--images does not go with --search. Leave one out.")
    others = ("search", "figures", "images", "calibrate")
    if arguments.sources and any(getattr(arguments, name) for name in others):
        raise ConfigError("--sources only lists numbers. Give it alone, or with --hardware.")
    if arguments.write and arguments.write.exists():
        raise ConfigError(f"--write {arguments.write}: exists. Name a new file, or remove it.")


def _configure_plan(
    arguments: argparse.Namespace,
    files: Sequence[Path],
    overrides: Sequence[str],
    folders: Sequence[Path],
) -> Tuple[Config, Optional[Calibration]]:
    """Read the configuration to plan, and fit to the runs of `--calibrate`."""
    from cxr_vit.planner.calibrate import calibrate, config_of_run
    from cxr_vit.planner.estimate import choose_hardware

    hardware = [f"planner.hardware={arguments.hardware}"] if arguments.hardware else []
    calibration = calibrate(folders, hardware) if folders else None
    if folders and not files:
        config = config_of_run(folders[0], [*overrides, *hardware])
    else:
        config = load_config(files, [*overrides, *hardware])
    check(config)
    if calibration and choose_hardware(config) is not calibration.runs[0].work.hardware:
        raise ConfigError(
            f"--calibrate: the runs were on {calibration.runs[0].device.split(' (')[0]}, and the"
            f" configuration is planned for {choose_hardware(config).name}. Give --hardware for"
            " both, or plan a configuration of the runs' engine."
        )
    return config, calibration


def _search(
    arguments: argparse.Namespace,
    config: Config,
    model: Optional[SpeedModel],
    files: Sequence[Path],
    overrides: Sequence[str],
) -> None:
    """Search for faster layouts; print them, and write and draw the best."""
    from cxr_vit.planner.report import search_lines
    from cxr_vit.planner.search import search

    found = search(
        config,
        micro_batches=arguments.micro_batches,
        accumulations=arguments.accumulations,
        model=model,
    )
    print(*search_lines(config, found), sep="\n")
    if not found.best:
        wanted = arguments.write or arguments.figures
        if wanted:
            raise ConfigError(f"{wanted} was not written: the search found nothing.")
        return
    layout, best = found.best[0]
    if arguments.write:
        overlay = layout.overlay(on_ipus=best.hardware.is_ipu)
        layout.write(
            arguments.write,
            on_ipus=best.hardware.is_ipu,
            comment=[
                _train_command([*files, arguments.write], overrides, overlay),
                "",
                f"Found by python -m cxr_vit plan --search: predicted {best.samples_per_s:,.0f}"
                f" samples/s on {best.devices} x {best.hardware.name}, the fullest"
                f" {100 * best.fullest.memory.share:.0f} % full.",
            ],
        )
        print(f"written: {arguments.write}")
    if arguments.figures:
        _draw(best, arguments.figures)


def _train_command(
    files: Sequence[Path], overrides: Sequence[str], overlay: Mapping[str, Mapping[str, object]]
) -> str:
    """Return the command that trains the result of a search.

    Overrides of searched keys are left out: they would win over the file.
    """
    searched = {f"{section}.{key}" for section, keys in overlay.items() for key in keys}
    searched.add("batch.global_batch_size")
    others = [word for word in overrides if word.partition("=")[0] not in searched]
    return " ".join(["python train.py --config", *map(str, files), *others])


def _draw(plan: Plan, folder: Path) -> None:
    from cxr_vit.planner.figures import memory_figure, timeline_figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in (("timeline", timeline_figure(plan)), ("memory", memory_figure(plan))):
        for suffix in ("png", "svg"):
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=100)
    print(f"figures: {', '.join(map(str, paths))}")


# The table of commands


class Command(NamedTuple):
    """A command of `python -m cxr_vit`: required arguments, summary, parser and function."""

    usage: str
    summary: str
    parser: Callable[[str], argparse.ArgumentParser]
    call: Callable[[argparse.Namespace], int]


COMMANDS: Dict[str, Command] = {
    "sample": Command(
        "--out DIR", "write a synthetic data set in NIH's layout", _sample_parser, _sample
    ),
    "check": Command(
        "--config FILE",
        "validate a configuration; print it, the batch arithmetic and the stages",
        _check_parser,
        _check,
    ),
    "plan": Command(
        "--config FILE",
        "predict memory and speed of a pipeline, or search for a better one",
        _plan_parser,
        _plan,
    ),
    "prepare": Command(
        "--config FILE",
        "decode and resize all images once, into the cache that training reads",
        _prepare_parser,
        _prepare,
    ),
    "data-report": Command(
        "--config FILE",
        "describe the data: findings, patients, splits, images left out",
        _data_report_parser,
        _data_report,
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run the command that the first word names; return the exit status."""
    usage = "usage: python -m cxr_vit COMMAND ...\n\ncommands:\n"
    for name, command in COMMANDS.items():
        usage += f"  {f'{name} {command.usage}':<27} {command.summary}\n"
    usage += "\npython -m cxr_vit COMMAND --help lists the options of a command."
    if not argv:
        print(usage, file=sys.stderr)
        return EXIT_USER_ERROR
    word, *others = argv
    if word in ("-h", "--help"):
        print(usage)
        return 0
    if word not in COMMANDS:
        near = did_you_mean(word, COMMANDS)
        hint = f" Did you mean {near!r}?" if near else ""
        print(f"unknown command {word!r}.{hint}\n\n{usage}", file=sys.stderr)
        return EXIT_USER_ERROR
    parser = COMMANDS[word].parser(f"python -m cxr_vit {word}")
    return COMMANDS[word].call(parser.parse_intermixed_args(others))
