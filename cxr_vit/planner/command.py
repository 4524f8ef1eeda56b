"""python -m cxr_vit plan: reads its command line and prints. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import List, Mapping, Optional, Sequence, Tuple

from cxr_vit.config import Config, check, load_config
from cxr_vit.errors import ConfigError
from cxr_vit.planner.calibrate import Calibration, calibrate, calibration_lines, config_of_run
from cxr_vit.planner.estimate import Plan, choose_hardware, make_plan
from cxr_vit.planner.report import plan_lines
from cxr_vit.planner.speed import SpeedModel

__all__ = ["add_arguments", "plan"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `plan` takes besides a configuration."""
    parser.add_argument(
        "--hardware",
        choices=["mk2", "bow", "gpu"],
        help="the device planned for; default: planner.hardware",
    )
    parser.add_argument(
        "--images",
        type=_number,
        metavar="N",
        help="training images an epoch; default: of the training list, else NIH's",
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="draw timeline and memory there, PNG and SVG"
    )
    parser.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="refit the constants of the speed to runs of your own, and plan the first of them"
        " where there is no --config",
    )
    parser.add_argument(
        "--search", action="store_true", help="look for faster cuts, batches and recomputations"
    )
    for name in ("micro-batches", "accumulations"):
        parser.add_argument(
            f"--{name}", type=_numbers, metavar="N,N,...", help=f"the {name} that --search tries"
        )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write what --search finds best, as a file to lay over the configuration",
    )
    parser.add_argument("--sources", action="store_true", help="list every number with its source")


def _number(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of 1 or more")
    return int(text)


def _numbers(text: str) -> List[int]:
    return sorted({_number(word) for word in text.split(",")})


def plan(
    arguments: argparse.Namespace, files: Sequence[Path], overrides: Sequence[str]
) -> Tuple[List[str], Optional[str]]:
    """Plan as the command line says; return the lines to print, and what went wrong in the end.

    Parameters
    ----------
    arguments
        Of `add_arguments`.
    files, overrides
        The configuration.

    Raises
    ------
    ConfigError
        If the configuration is wrong, or a run has no log to calibrate by.
    """
    _check_arguments(arguments)
    # `--calibrate runs/a optim.lr=1` reads as a person means it.
    folders = [path for path in arguments.calibrate if "=" not in str(path) or path.exists()]
    overrides = [*overrides, *(str(path) for path in arguments.calibrate if path not in folders)]
    arguments.calibrate = folders
    config, calibration = _configure(arguments, files, overrides)
    if arguments.sources:
        from cxr_vit.planner.report import source_lines

        return source_lines(choose_hardware(config)), None
    model = calibration.after if calibration else None
    lines = [*calibration_lines(calibration), ""] if calibration else []
    if arguments.search:
        sources = files or [folder / "config.yaml" for folder in folders[:1]]
        found, problem = _search(arguments, config, model, sources, overrides)
        return [*lines, *found], problem
    made = make_plan(config, model=model, images=arguments.images)
    lines += plan_lines(config, made)
    if arguments.figures:
        lines += _draw(made, arguments.figures)
    return lines, None


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("write", "micro_batches", "accumulations"):
        if getattr(arguments, name) and not arguments.search:
            raise ConfigError(f"--{name.replace('_', '-')} is for --search. Give both, or neither.")
    if arguments.search and arguments.images:
        raise ConfigError("--images is for a plan, not for --search.")
    others = ("search", "figures", "images", "calibrate")
    if arguments.sources and any(getattr(arguments, name) for name in others):
        raise ConfigError("--sources only lists numbers: give it alone, or with --hardware.")
    if arguments.write and arguments.write.exists():
        raise ConfigError(f"--write {arguments.write}: exists. Name a new file, or remove it.")


def _configure(
    arguments: argparse.Namespace, files: Sequence[Path], overrides: Sequence[str]
) -> Tuple[Config, Optional[Calibration]]:
    """Read the configuration, and the runs to calibrate by."""
    folders = arguments.calibrate
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
) -> Tuple[List[str], Optional[str]]:
    from cxr_vit.planner.report import search_lines
    from cxr_vit.planner.search import search

    found = search(
        config,
        micro_batches=arguments.micro_batches,
        accumulations=arguments.accumulations,
        model=model,
    )
    lines = search_lines(config, found)
    if not found.best:
        wanted = arguments.write or arguments.figures
        return lines, f"{wanted} was not written: nothing was found." if wanted else None
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
        lines.append(f"written: {arguments.write}")
    return [*lines, *(_draw(best, arguments.figures) if arguments.figures else [])], None


def _train_command(
    files: Sequence[Path],
    overrides: Sequence[str],
    overlay: Mapping[str, Mapping[str, object]],
) -> str:
    """Return the command that trains what was found; overrides of what was searched would win."""
    searched = {f"{section}.{key}" for section, keys in overlay.items() for key in keys}
    searched.add("batch.global_batch_size")
    others = [word for word in overrides if word.partition("=")[0] not in searched]
    return " ".join(["python train.py --config", *map(str, files), *others])


def _draw(found: Plan, folder: Path) -> List[str]:
    from cxr_vit.planner.figures import memory_figure, timeline_figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in (("timeline", timeline_figure(found)), ("memory", memory_figure(found))):
        for suffix in ("png", "svg"):
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=100)
    return [f"figures: {', '.join(map(str, paths))}"]
