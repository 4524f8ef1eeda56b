"""Train a model, or resume a run.

python train.py --config configs/vit_demo.yaml [more.yaml ...] [section.key=value ...]
python train.py --resume runs/<name>
python train.py --config configs/vit_pod4.yaml --compile-only
"""

from __future__ import annotations

from typing import Sequence

from cxr_vit.cli import EXIT_STOPPED, importing, train_arguments
from cxr_vit.data.text_files import check_data_root
from cxr_vit.engines.processes import Launch
from cxr_vit.planner.estimate import preflight
from cxr_vit.training.run_folder import read_run_config


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = train_arguments(argv)
    if arguments.compile_only:
        from cxr_vit.commands.compile_only import compile_only

        return compile_only(arguments.files, arguments.overrides)
    launch = Launch.from_environment()
    config, resume, checkpoint = read_run_config(
        arguments.files, arguments.overrides, arguments.resume, launch
    )
    check_data_root(config.data)

    with importing():
        from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
        from cxr_vit.commands.callbacks import PlanFigures

    trainer = Trainer(config, callbacks=[PlanFigures()])
    preflight(config, trainer.choice.name, launch.local_replicas)
    data = ChestXrayDataModule(config)
    module = ViTModule(config, data, checkpoint=checkpoint)
    trainer.fit(module, data, ckpt_path=resume)
    return EXIT_STOPPED if trainer.interrupted and not trainer.is_complete else 0
