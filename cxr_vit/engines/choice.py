"""Chooses and builds the engine a config asks for."""

from __future__ import annotations

from cxr_vit.config.batching import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.engines.base import Engine
from cxr_vit.engines.precision import choose
from cxr_vit.engines.torch_engine import TorchEngine
from cxr_vit.model.stages import StagedViT

__all__ = ["build_engine"]


def build_engine(config: Config, model: StagedViT) -> Engine:
    """Build the engine of `engine.name`; `auto` takes a CUDA device where one answers.

    Raises
    ------
    EngineUnavailable
        If it cannot run here.
    """
    return TorchEngine(
        model,
        BatchPlan.from_section(config.batch),
        config.optim,
        choose(config.engine),
        seed=config.run.seed,
        num_workers=config.data.num_workers,
    )
