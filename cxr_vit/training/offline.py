"""Compile the graphs of a configuration for IPUs in advance, without an IPU and without data."""

from __future__ import annotations

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.ipu_rules import check_ipu
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.ipu.engine import PopTorchEngine
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError, DeviceError
from cxr_vit.model.module import ViTModule


def check_offline(config: Config) -> None:
    """Raise ConfigError if no cache is given, or PopTorch refuses the configuration."""
    check_ipu(config)
    if config.engine.executable_cache is None:
        raise ConfigError(
            "engine.executable_cache=null: --compile-only would throw its work away. Name a folder."
        )
    if config.engine.log_cycles:
        raise ConfigError("engine.log_cycles=true needs an IPU: leave it out with --compile-only.")


def compile_offline(module: ViTModule) -> str:
    """Compile both graphs into `engine.executable_cache`; return a line about the result.

    Weights are sent when a graph is attached, so neither data nor a trained head is needed.

    Raises
    ------
    EngineUnavailable
        If PopTorch is not installed.
    DeviceError
        If compilation fails, or the cache is empty afterwards.
    """
    config, launch = module.config, Launch.from_environment()
    choice = choose_engine(config, launch, offline=True)
    module.setup(for_ipu=True)
    batch = BatchPlan.from_section(config.batch)
    with build_engine(config, module, choice, batch, launch, offline=True) as engine:
        size = engine.local_batch.host_batch_size
        classes = len(module.names)
        example = Batch.zeros(size, image_size=config.data.image_size, num_classes=classes)
        seconds = engine.compile(example)
        assert isinstance(engine, PopTorchEngine)
        cache = engine.graphs.cache
    if not cache.files():
        raise DeviceError(
            f"both graphs were compiled, but PopTorch left nothing in {cache.path}. Is the folder"
            " writable, and the disk full? Name another engine.executable_cache."
        )
    return f"compiled for {config.engine.ipu_version} in {seconds:.1f} s into {cache.path}"
