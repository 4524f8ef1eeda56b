"""The model that maps are computed with, whatever engine and precision the run has."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Callable

from cxr_vit import ViTModule
from cxr_vit.config import Config
from cxr_vit.engines.devices import choose_device
from cxr_vit.engines.processes import Launch
from cxr_vit.model.stages import StagedViT
from cxr_vit.saliency.explainer import Explainer


def map_model(module: ViTModule) -> StagedViT:
    """Build the model of a checkpoint, frozen, for evaluation in fp32 on the torch device.

    The module is none that an engine holds: that may be a part of the model, compiled, or in
    another precision.

    Raises EngineUnavailable, or ModelError or CheckpointError as loading the checkpoint does.
    """
    # A precision that the device does not have would be refused.
    engine = module.config.engine.model_copy(update={"precision": "fp32"})
    device = choose_device(engine, Launch.from_environment()).device
    module.setup()
    return module.model.to_device(device).eval().requires_grad_(False)


def explainer_of(checkpoint: Path, config: Config, method: str) -> Callable[[], Explainer]:
    """Return what loads a checkpoint at the first call, and always returns the same explainer."""

    @lru_cache(maxsize=None)
    def explainer() -> Explainer:
        module = ViTModule.load_from_checkpoint(checkpoint, config=config)
        return Explainer(map_model(module), config, method)

    return explainer
