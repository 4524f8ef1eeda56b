"""The command `check`: what a configuration means."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from cxr_vit.cli import COMMANDS, config_parser, files_and_overrides
from cxr_vit.config import BatchPlan, StagePlan, dump_config, load_config
from cxr_vit.config.architectures import SIZES
from cxr_vit.config.ipu_rules import ipu_problems, ipu_warnings
from cxr_vit.config.rules import describe_processes
from cxr_vit.planner.estimate import describe_memory, preflight


def check(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = config_parser("check", description=COMMANDS["check"].summary)
    config = load_config(*files_and_overrides(parser.parse(argv)))
    if config.model.name not in SIZES and Path(config.model.name).exists():
        from cxr_vit.model.vit import check_files  # takes a second

        check_files(config.model)
    print(dump_config(config))
    print(*BatchPlan.from_section(config.batch).describe(), sep="\n")
    if config.optim.base_lr is not None:
        of = f"optim.base_lr={config.optim.base_lr:g} x {config.batch.images_per_update} / 256"
        print(f"peak rate       {config.peak_lr:g} = {of} samples")
    print(*StagePlan.from_list(config.pipeline.layers_per_stage).describe(), sep="\n")
    print(describe_processes(config))
    refused = ipu_problems(config)
    verdict = "refused:" if refused else "nothing here that PopTorch would refuse"
    print(f"on IPUs      {verdict}", *refused, sep="\n  ")
    for warning in ipu_warnings(config):
        print(f"on IPUs      warning: {warning}")
    for line in describe_memory(config):
        print(f"on IPUs      {line}")
    if config.planner.strict:
        preflight(config, config.engine.name)
    return 0
