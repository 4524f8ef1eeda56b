"""python -m cxr_vit sample | check."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Sequence

from cxr_vit.cli import EXIT_USER_ERROR, config_parser, read_config, run
from cxr_vit.config import BatchPlan, check, dump_config, load_config
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.errors import did_you_mean
from cxr_vit.model.plan import StagePlan

_USAGE = """usage: python -m cxr_vit COMMAND ...

commands:
  sample --out DIR     write a synthetic data set in NIH's layout
  check --config FILE  validate a configuration; print it, the batch arithmetic and the stages

python -m cxr_vit COMMAND --help says more."""


def main(argv: Sequence[str]) -> int:
    """Run the command that the first word names."""
    commands = {"sample": _sample, "check": _check}
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
    from cxr_vit.data.sample import write_sample

    parser = argparse.ArgumentParser(
        "python -m cxr_vit sample",
        description="Write a synthetic data set in NIH ChestX-ray14's layout: no real film.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="number of films")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="side of a film")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data set")
    arguments = parser.parse_args(argv)
    count = write_sample(
        arguments.out, num_images=arguments.images, image_size=arguments.size, seed=arguments.seed
    )
    print(f"{count} synthetic films in {arguments.out}; use them with data.root={arguments.out}")
    return 0


def _check(argv: Sequence[str]) -> int:
    parser = config_parser(
        "python -m cxr_vit check", "Validate a configuration and print what it means."
    )
    config = check(load_config(*read_config(parser.parse_intermixed_args(argv))))
    print(dump_config(config))
    print("\n".join(BatchPlan.from_section(config.batch).describe()))
    print("\n".join(StagePlan.from_list(config.pipeline.layers_per_stage).describe()))
    refused = ipu_problems(config)
    if refused:
        print("on IPUs      refused by PopTorch:", *refused, sep="\n  ")
    else:
        print("on IPUs      nothing here that PopTorch would refuse")
    return 0


if __name__ == "__main__":
    run(main)
