"""The folder of a run whose only checkpoint has random weights: nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
from cxr_vit.config import load_config
from cxr_vit.engines.base import EngineState
from cxr_vit.model.module import ViTModule
from cxr_vit.training.checkpoint import CheckpointStore
from cxr_vit.training.run_folder import RunFolder

#: Images of 40 pixels, of which the model sees 32.
SETTINGS = ("data.image_size=32", "data.resize=40", "pipeline.layers_per_stage=[1, 1]")


def module_of_kind(kind: str, folder: Path, *overrides: str) -> ViTModule:
    """Return a module with all parameters far from their initial values."""
    families.save(kind, folder)
    module = ViTModule(load_config([], [*SETTINGS, f"model.name={folder}", *overrides]))
    module.setup()
    return module.eval()  # type: ignore[no-any-return]


def save_run(kind: str, folder: Path, *overrides: str) -> ViTModule:
    """Write the folder of a run and return its module."""
    weights = folder.with_name(f"{folder.name}_weights")
    module = module_of_kind(kind, weights, *overrides, f"run.dir={folder}", "run.name=random")
    run = RunFolder.create(module.config.run)
    run.write_config(module.config)
    store = CheckpointStore(run.checkpoints)
    files = {**module.model.hub_files(), "config.yaml": run.config_text(module.config)}
    state: Any = {"evaluated_step": 0, "best_score": None, "best_step": 0, "callbacks": {}}
    path = store.save(0, EngineState(module.model.weights()), files=files, trainer_state=state)
    store.link("best", path)
    return module
