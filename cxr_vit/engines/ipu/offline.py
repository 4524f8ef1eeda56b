"""Compile the graphs of a configuration for IPUs on a machine that has none."""

from __future__ import annotations

import numpy as np

from cxr_vit.config.ipu_rules import check_ipu
from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.data.dataset import Batch
from cxr_vit.data.labels import label_names
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.ipu.engine import PopTorchEngine
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError, DeviceError
from cxr_vit.model.stages import StagedViT


def compile_offline(config: Config, launch: Launch) -> str:
    """Compile both graphs into `engine.executable_cache`; return a line about the result.

    Weights are sent when a graph is attached, so neither data nor a trained head is needed.

    Raises
    ------
    ConfigError
        If no cache is given, or PopTorch refuses the configuration.
    EngineUnavailable
        If PopTorch is not installed.
    DeviceError
        If compilation fails, or the cache is empty afterwards.
    """
    check_ipu(config)
    if config.engine.executable_cache is None:
        raise ConfigError(
            "engine.executable_cache=null: --compile-only would throw its work away. Name a folder."
        )
    if config.engine.log_cycles:
        raise ConfigError("engine.log_cycles=true needs an IPU: leave it out with --compile-only.")
    names = label_names(include_no_finding=config.data.include_no_finding)
    choice = choose_engine(config, launch, offline=True)
    prevalence = np.full(len(names), 0.5)
    model = StagedViT.from_config(config, names=names, prevalence=prevalence, for_ipu=True)
    batch = BatchPlan.from_section(config.batch)
    with build_engine(config, model, choice, batch, launch, offline=True) as engine:
        size = engine.local_batch.host_batch_size
        example = Batch.zeros(size, image_size=config.data.image_size, num_classes=len(names))
        seconds = engine.compile(example)
        assert isinstance(engine, PopTorchEngine)
        cache = engine.graphs.cache
    if not cache.files():
        raise DeviceError(
            f"both graphs were compiled, but PopTorch left nothing in {cache.path}. Is the folder"
            " writable, and the disk full? Name another engine.executable_cache."
        )
    return f"compiled for {config.engine.ipu_version} in {seconds:.1f} s into {cache.path}"
