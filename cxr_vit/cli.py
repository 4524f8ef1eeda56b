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
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
)

from cxr_vit.config import BatchPlan, Config, StagePlan, check, dump_config, load_config
from cxr_vit.config.help import help_text
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.rules import describe_processes
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError, CxrVitError, suggestion

if TYPE_CHECKING:
    from cxr_vit.planner.estimate import Plan
    from cxr_vit.planner.hardware import Target
    from cxr_vit.planner.speed import SpeedModel

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
    logging.basicConfig(format="%(levelname)s: %(message)s")  # to stderr, from WARNING on
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
    for line in str(error).split("\n"):
        print(f"{type(error).__name__}: {line}", file=sys.stderr)
    return EXIT_USER_ERROR


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


def _config_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Make a parser with `--config` and overrides, whose help lists every field."""
    parser = argparse.ArgumentParser(
        program,
        description=description,
        epilog="sections and fields:\n\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, text = parser.add_argument, "YAML files, merged left to right"
    add("--config", nargs="+", action="extend", default=[], metavar="FILE", help=text)
    text = "overrides, win over every file"
    add("overrides", nargs="*", metavar="section.key=value", help=text)
    return parser


def _read_config(arguments: argparse.Namespace) -> Tuple[List[Path], List[str]]:
    """Return the configuration files and the overrides of a parsed command line."""
    files, overrides = _split_overrides(arguments.config)
    return files, [*overrides, *arguments.overrides]


def _split_overrides(words: Sequence[str]) -> Tuple[List[Path], List[str]]:
    """Separate paths from overrides, for `--config a.yaml optim.lr=1e-4`."""
    paths = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    return paths, overrides


def train_arguments(argv: Sequence[str]) -> TrainArguments:
    """Parse the command line of train.py."""
    parser = _config_parser("train.py", "Fine-tune a Vision Transformer on chest X-rays.")
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
    namespace = parser.parse_intermixed_args(argv)
    files, overrides = _read_config(namespace)
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
    add, text = parser.add_argument, "e.g. runs/<name>/checkpoints/best"
    add("--checkpoint", type=Path, required=True, metavar="DIR", help=text)
    text = "default: test, or val where the split has no test images"
    add("--split", choices=["train", "val", "test"], help=text)
    add("--out", type=Path, metavar="DIR", help="default: <run>/report")
    text = "overrides of the run's configuration (train.py --help lists the fields)"
    add("overrides", nargs="*", metavar="section.key=value", help=text)
    return EvaluateArguments(**vars(parser.parse_intermixed_args(argv)))


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--images", type=int, default=2000, metavar="N", help="default: 2000")
    add("--size", type=int, default=128, metavar="PIXELS", help="side of an image; default: 128")
    add("--seed", type=int, default=0, help="same seed, same data set; default: 0")


def _sample(arguments: argparse.Namespace) -> int:
    from cxr_vit.synthetic.dataset import write_sample

    count = write_sample(
        arguments.out, num_images=arguments.images, image_size=arguments.size, seed=arguments.seed
    )
    print(f"{count} synthetic images in {arguments.out}; use them with data.root={arguments.out}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from cxr_vit.planner.estimate import describe_memory, preflight

    config = check(load_config(*_read_config(arguments)))
    print(dump_config(config))
    print(*BatchPlan.from_section(config.batch).describe(), sep="\n")
    print(*StagePlan.from_list(config.pipeline.layers_per_stage).describe(), sep="\n")
    print(describe_processes(config))
    refused = ipu_problems(config)
    verdict = "refused by PopTorch:" if refused else "nothing here that PopTorch would refuse"
    print(f"on IPUs      {verdict}", *refused, sep="\n  ")
    print(f"on IPUs      {describe_memory(config)}")
    if config.planner.strict:
        preflight(config, config.engine.name)
    return 0


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    text = "check every image of the cache, by its checksum and against its file"
    parser.add_argument("--verify", action="store_true", help=text)


def _prepare(arguments: argparse.Namespace) -> int:
    from cxr_vit.data.datamodule import prepare, verify_cache
    from cxr_vit.synthetic.dataset import write_sample_if_absent

    data = check(load_config(*_read_config(arguments))).data
    write_sample_if_absent(data)
    print(verify_cache(data) if arguments.verify else prepare(data))
    return 0


def _add_data_report_arguments(parser: argparse.ArgumentParser) -> None:
    name = "data_report.html"
    parser.add_argument("--out", type=Path, default=name, metavar="FILE", help=f"default: {name}")


def _data_report(arguments: argparse.Namespace) -> int:
    from cxr_vit.data.datamodule import ChestXrayDataModule
    from cxr_vit.dataset_report.report import write_data_report
    from cxr_vit.synthetic.dataset import write_sample_if_absent

    data = check(load_config(*_read_config(arguments))).data
    write_sample_if_absent(data)
    # The report lists missing and unusable images, so neither may stop it.
    lenient = data.model_copy(update={"on_missing": "skip", "on_bad_image": "skip"})
    print(write_data_report(ChestXrayDataModule(lenient), arguments.out))
    print(f"page: {arguments.out}")
    return 0


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hardware", choices=["mk2", "bow"], help="IPU to plan for; default: planner.hardware")
    add(
        "--images",
        type=_number,
        metavar="N",
        help="training images per epoch; default: as in the training list, else as in NIH's",
    )
    add("--figures", type=Path, metavar="DIR", help="write figures of timeline and memory there")
    add(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="RUN",
        help="fit the constants of the speed model to runs of your own; without --config, plan the"
        " first of them",
    )
    add("--search", action="store_true", help="search for faster cuts, batches, recomputations")
    for name in ("micro-batches", "accumulations"):
        add(f"--{name}", type=_numbers, metavar="N,N,...", help=f"{name} that --search tries")
    add("--write", type=Path, metavar="FILE", help="write the best of --search, as overrides")
    add("--sources", action="store_true", help="list every number with its source")


def _number(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of 1 or more")
    return int(text)


def _numbers(text: str) -> List[int]:
    return sorted({_number(word) for word in text.split(",")})


def _plan(arguments: argparse.Namespace) -> int:
    from cxr_vit.planner.calibrate import calibrate, calibration_lines, config_of_run
    from cxr_vit.planner.estimate import make_plan
    from cxr_vit.planner.hardware import find_target
    from cxr_vit.planner.report import plan_lines, source_lines

    _check_plan_arguments(arguments)
    files, overrides = _read_config(arguments)
    folders, more = _split_overrides(arguments.calibrate)
    overrides += more
    hardware = [f"planner.hardware={arguments.hardware}"] if arguments.hardware else []
    calibration = calibrate(folders, hardware) if folders else None
    if folders and not files:
        config = check(config_of_run(folders[0], [*overrides, *hardware]))
        files = [folders[0] / "config.yaml"]
    else:
        config = check(load_config(files, [*overrides, *hardware]))
    target, model = find_target(config), None
    if arguments.sources:
        print(*source_lines(target), sep="\n")
        return 0
    if calibration:
        target, model = calibration.target_for(target), calibration.after
        print(*calibration_lines(calibration), "", sep="\n")
    if arguments.search:
        _search(arguments, config, target, model, files, overrides)
        return 0
    plan = make_plan(config, target=target, model=model, images=arguments.images)
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


def _search(
    arguments: argparse.Namespace,
    config: Config,
    target: Target,
    model: Optional[SpeedModel],
    files: Sequence[Path],
    overrides: Sequence[str],
) -> None:
    """Search for faster layouts; print them, and write and draw the best."""
    from cxr_vit.planner.report import describe_result, search_lines
    from cxr_vit.planner.search import search

    tried = {name: getattr(arguments, name) for name in ("micro_batches", "accumulations")}
    found = search(config, target=target, model=model, **tried)
    print(*search_lines(config, found, target), sep="\n")
    wanted = arguments.write or arguments.figures
    if wanted and not found.best:
        raise ConfigError(f"{wanted} was not written: the search found nothing.")
    if not wanted:
        return
    layout, best = found.best[0]
    if arguments.write:
        on_ipus = target.ipu is not None
        overlay = layout.overlay(on_ipus=on_ipus)
        command = _train_command([*files, arguments.write], overrides, overlay)
        result = f"Found by python -m cxr_vit plan --search {describe_result(best)}."
        layout.write(arguments.write, on_ipus=on_ipus, comment=[command, "", result])
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


class Command(NamedTuple):
    """A command of `python -m cxr_vit`."""

    summary: str
    call: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    takes_config: bool = True


COMMANDS = {
    "sample": Command(
        "write a synthetic data set in NIH's layout, without real images",
        _sample,
        _add_sample_arguments,
        takes_config=False,
    ),
    "check": Command(
        "validate a configuration; print it, the batch arithmetic and the stages", _check
    ),
    "plan": Command(
        "predict memory and speed of a pipeline, or search for a better one; needs no SDK, no"
        " device and no data",
        _plan,
        _add_plan_arguments,
    ),
    "prepare": Command(
        "decode and resize all images once, into the cache that training reads",
        _prepare,
        _add_prepare_arguments,
    ),
    "data-report": Command(
        "describe the data set, as text and as an HTML page: findings, patients, splits, images"
        " left out; decodes every image, into the cache if one is configured",
        _data_report,
        _add_data_report_arguments,
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run the command that the first word names; return the exit status."""
    if argv and argv[0] in COMMANDS:
        command, program = COMMANDS[argv[0]], f"python -m cxr_vit {argv[0]}"
        make = _config_parser if command.takes_config else argparse.ArgumentParser
        parser = make(program, description=command.summary)
        command.add_arguments(parser)
        return command.call(parser.parse_intermixed_args(argv[1:]))
    lines = [f"  {name:<12} {command.summary}\n" for name, command in COMMANDS.items()]
    usage = "usage: python -m cxr_vit COMMAND ...\n\ncommands:\n" + "".join(lines)
    usage += "\npython -m cxr_vit COMMAND --help lists the options of a command."
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if argv:
        print(f"unknown command {argv[0]!r}.{suggestion(argv[0], COMMANDS)}\n", file=sys.stderr)
    print(usage, file=sys.stderr)
    return EXIT_USER_ERROR
