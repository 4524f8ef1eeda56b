"""python -m cxr_vit sample | check | plan | prepare | data-report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Sequence

from cxr_vit.cli import EXIT_USER_ERROR, config_parser, read_config, run
from cxr_vit.config import BatchPlan, check, dump_config, load_config
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.plans import StagePlan
from cxr_vit.config.rules import describe_processes
from cxr_vit.errors import ConfigError, did_you_mean
from cxr_vit.planner.estimate import describe_memory, preflight

_USAGE = """usage: python -m cxr_vit COMMAND ...

commands:
  sample --out DIR           write a synthetic data set in NIH's layout
  check --config FILE        validate a configuration; print it, the batch arithmetic and the stages
  plan --config FILE         predict memory and speed of a pipeline, or search for a better one
  prepare --config FILE      decode and resize all images once, into the cache that training reads
  data-report --config FILE  what the data are: findings, patients, splits, images left out

python -m cxr_vit COMMAND --help says more."""


def main(argv: Sequence[str]) -> int:
    """Run the command that the first word names."""
    commands = {
        "sample": _sample,
        "check": _check,
        "plan": _plan,
        "prepare": _prepare,
        "data-report": _data_report,
    }
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if argv:
        near = did_you_mean(argv[0], commands)
        hint = f" Did you mean {near!r}?" if near else ""
        print(f"unknown command {argv[0]!r}.{hint}\n", file=sys.stderr)
    print(_USAGE, file=sys.stderr)
    return EXIT_USER_ERROR


def _sample(argv: Sequence[str]) -> int:
    from cxr_vit.synthetic.dataset import write_sample

    parser = argparse.ArgumentParser(
        "python -m cxr_vit sample",
        description="Write a synthetic data set in NIH ChestX-ray14's layout: no real image.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="number of images")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="side of an image")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data set")
    arguments = parser.parse_args(argv)
    count = write_sample(
        arguments.out, num_images=arguments.images, image_size=arguments.size, seed=arguments.seed
    )
    print(f"{count} synthetic images in {arguments.out}; use them with data.root={arguments.out}")
    return 0


def _check(argv: Sequence[str]) -> int:
    parser = config_parser(
        "python -m cxr_vit check", "Validate a configuration and print what it means."
    )
    config = check(load_config(*read_config(parser.parse_intermixed_args(argv))))
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


def _plan(argv: Sequence[str]) -> int:
    from cxr_vit.planner.command import add_arguments, plan

    parser = config_parser(
        "python -m cxr_vit plan",
        "Predict memory, time and speed of a pipeline before renting the machine. It needs no SDK,"
        " no IPU and no data.",
    )
    add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    lines, problem = plan(arguments, *read_config(arguments))
    print("\n".join(lines))
    if problem:
        raise ConfigError(problem)
    return 0


def _prepare(argv: Sequence[str]) -> int:
    from cxr_vit.data.datamodule import prepare, verify_cache

    parser = config_parser(
        "python -m cxr_vit prepare",
        "Decode and resize all images of the CSV once, into the cache that training reads.",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check every image of the cache, by its checksum and against its file",
    )
    arguments = parser.parse_intermixed_args(argv)
    data = check(load_config(*read_config(arguments))).data
    print(verify_cache(data) if arguments.verify else prepare(data))
    return 0


def _data_report(argv: Sequence[str]) -> int:
    from cxr_vit.data.datamodule import ChestXrayDataModule
    from cxr_vit.dataset_report.report import write_data_report

    parser = config_parser(
        "python -m cxr_vit data-report",
        "Say what the data are, as text and as one HTML page with figures and sample images. Every"
        " image is decoded first, into the cache if there is to be one.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data_report.html"),
        metavar="FILE",
        help="the page; default: data_report.html",
    )
    arguments = parser.parse_intermixed_args(argv)
    data = check(load_config(*read_config(arguments))).data
    # Which images are missing or of no use is what the report is for.
    lenient = data.model_copy(update={"on_missing": "skip", "on_bad_image": "skip"})
    print(write_data_report(ChestXrayDataModule(lenient), arguments.out))
    print(f"page: {arguments.out}")
    return 0


if __name__ == "__main__":
    run(main)
