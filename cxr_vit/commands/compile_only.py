"""`train.py --compile-only`: compile the graphs for IPUs in advance."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from cxr_vit.config import load_config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.model.module import ViTModule
from cxr_vit.planner.estimate import preflight
from cxr_vit.training.offline import check_offline, compile_offline


def compile_only(files: Sequence[Path], overrides: Sequence[str]) -> int:
    """Compile the graphs of a configuration; return the exit status."""
    config = load_config(files, overrides)
    check_offline(config)
    preflight(config, "poptorch")
    # The weights of the labels are constants of the graph, from the label files.
    data = ChestXrayDataModule(config) if config.loss.name == "weighted_bce" else None
    print(compile_offline(ViTModule(config, data)))
    return 0
