"""The command `plan`: predict memory and speed, search for a better layout, fit to own runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import List, Mapping, Optional, Sequence

from cxr_vit.cli import (
    COMMANDS,
    Parser,
    config_parser,
    files_and_overrides,
    program,
    split_overrides,
)
from cxr_vit.config import Config, check, load_config
from cxr_vit.config.files import overlay_text, write_new
from cxr_vit.errors import ConfigError
from cxr_vit.planner.calibrate import calibrate, calibration_lines, config_of_run
from cxr_vit.planner.estimate import Plan, make_plan, plan_evaluation
from cxr_vit.planner.hardware import Target, find_target
from cxr_vit.planner.report import describe_result, plan_lines, search_lines, source_lines
from cxr_vit.planner.search import search
from cxr_vit.planner.speed import SpeedModel


def plan(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse(argv)
    _check_arguments(arguments)
    files, overrides = files_and_overrides(arguments)
    folders, more = split_overrides(arguments.calibrate)
    overrides += more
    hardware = [f"planner.hardware={arguments.hardware}"] if arguments.hardware else []
    calibration = calibrate(folders, hardware) if folders else None
    if folders and not files:
        config = check(config_of_run(folders[0], [*overrides, *hardware]))
        files = [folders[0] / "config.yaml"]
    else:
        config = load_config(files, [*overrides, *hardware])
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
    predicted = make_plan(config, target=target, model=model, images=arguments.images)
    evaluation = plan_evaluation(config, target=target, model=model)
    print(*plan_lines(config, predicted, evaluation), sep="\n")
    if arguments.figures:
        _draw(predicted, arguments.figures)
    return 0


def _parser() -> Parser:
    parser = config_parser("plan", description=COMMANDS["plan"].summary)
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
    return parser


def _number(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of 1 or more")
    return int(text)


def _numbers(text: str) -> List[int]:
    return sorted({_number(word) for word in text.split(",")})


def _check_arguments(arguments: argparse.Namespace) -> None:
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
    tried = {name: getattr(arguments, name) for name in ("micro_batches", "accumulations")}
    found = search(config, target=target, model=model, **tried)
    print(*search_lines(config, found, target), sep="\n")
    wanted = arguments.write or arguments.figures
    if wanted and not found.best:
        raise ConfigError(f"{wanted} was not written: the search found nothing.")
    if not wanted:
        return
    best = found.best[0].plan
    if arguments.write:
        overlay = found.overlay(on_ipus=target.ipu is not None)
        command = _train_command([*files, arguments.write], overrides, overlay)
        result = f"Found by {program('plan')} --search {describe_result(best)}."
        write_new(arguments.write, overlay_text(overlay, [command, "", result]))
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
    return " ".join([program("train"), "--config", *map(str, files), *others])


def _draw(plan: Plan, folder: Path) -> None:
    from cxr_vit.planner.figures import memory_figure, timeline_figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in (("timeline", timeline_figure(plan)), ("memory", memory_figure(plan))):
        for suffix in ("png", "svg"):
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=100)
    print(f"figures: {', '.join(map(str, paths))}")
