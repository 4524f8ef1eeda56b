"""Choose and build the engine of a configuration."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

import torch

from cxr_vit.config.ipu_rules import check_ipu, eval_layers, ipu_warnings
from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.rules import check_processes
from cxr_vit.config.schema import Config
from cxr_vit.engines.base import Engine
from cxr_vit.engines.compiled import check_compile
from cxr_vit.engines.devices import DeviceChoice, choose_device
from cxr_vit.engines.ipu.engine import PopTorchEngine
from cxr_vit.engines.ipu.options import poptorch_problem
from cxr_vit.engines.process_group import ProcessGroup, coordinator
from cxr_vit.engines.processes import Launch
from cxr_vit.engines.torch_engine import TorchEngine
from cxr_vit.errors import ConfigError, EngineUnavailable
from cxr_vit.model.module import ViTModule

logger = logging.getLogger(__name__)

#: The oldest torch for the pipeline engine: 2.6 does not wait for all that 1F1B sends over gloo,
#: and 2.8 cannot score several stages per process.
_PIPELINING = (2, 10)


class EngineChoice(NamedTuple):
    """An engine's name and the reason for it."""

    name: str
    reason: str

    @property
    def is_ipu(self) -> bool:
        """Whether the model runs on IPUs."""
        return self.name == "poptorch"


def choose_engine(config: Config, launch: Launch, *, offline: bool = False) -> EngineChoice:
    """Choose the engine of `engine.name`.

    `auto` chooses IPUs where PopTorch imports and enough IPUs answer, else a torch device. An
    explicit `engine.device` wins; `offline`, to compile only, means IPUs.

    Raises
    ------
    EngineUnavailable
        If the requested IPUs are not available.
    ConfigError
        If IPUs are available but PopTorch refuses the configuration, or if torchrun started a
        number of processes that does not fit it.
    """
    choice = _choose(config, launch, offline)
    if not choice.is_ipu:
        check_processes(config, choice.name, launch.world_size if launch.is_connected else 1)
        check_compile(config.engine)
    elif launch.is_connected:
        raise EngineUnavailable(
            "IPUs answer here, and their processes are started by poprun, not by torchrun"
            " (engine.name=torch or pipeline leaves the IPUs alone)."
        )
    return choice


def _choose(config: Config, launch: Launch, offline: bool) -> EngineChoice:
    engine = config.engine
    if engine.name == "pipeline" and not offline:
        check_pipelining("engine.name=pipeline")
        return EngineChoice("pipeline", "engine.name=pipeline")
    if engine.name == "torch" and not offline:
        return EngineChoice("torch", "engine.name=torch")
    if engine.name == "auto" and engine.device != "auto" and not offline:
        return EngineChoice("torch", "engine.device is one of torch's")
    local_replicas = launch.local_replicas
    problem = poptorch_problem(config, local_replicas=local_replicas, offline=offline)
    if problem is None:
        hint = " (IPUs answer here; engine.name=torch leaves them alone.)"
        hint = hint if engine.name == "auto" and not offline else ""
        check_ipu(config, hint, replicas=local_replicas)
        if launch.is_main:
            for warning in ipu_warnings(config):
                logger.warning("%s", warning)
        why = "IPUs answer" if engine.name == "auto" else "engine.name=poptorch"
        return EngineChoice("poptorch", "--compile-only" if offline else why)
    if engine.name == "poptorch" or offline:
        raise EngineUnavailable(str(problem))
    return EngineChoice("torch", f"no IPU: {problem.given} {problem.rule}".rstrip("."))


def build_engine(
    config: Config,
    module: ViTModule,
    choice: EngineChoice,
    batch: BatchPlan,
    launch: Launch,
    *,
    offline: bool = False,
) -> Engine:
    """Build the chosen engine for a module that is set up `for_ipu` if the choice is.

    Raises
    ------
    EngineUnavailable
        If it cannot run here.
    ConfigError
        If the processes that torchrun or poprun started do not fit the configuration.
    """
    if choice.is_ipu:
        _check_poprun(config, launch)
        return PopTorchEngine(module, config, batch, launch, reason=choice.reason, offline=offline)
    batch = replace(batch, eval_replicas=batch.replicas)  # the others are for IPUs
    device = choose_device(config.engine, launch)
    _check_same_device(choice, device, launch)
    device = device._replace(reason=f"{choice.reason}; {device.reason}")
    group = ProcessGroup(launch, device.device, config.engine.timeout_s)
    if choice.name == "pipeline":
        # Needs a newer torch than PopTorch's.
        from cxr_vit.engines.pipeline_engine import PipelineEngine

        return PipelineEngine(module, config, batch, device, group)
    return TorchEngine(module, config, batch, device, group)


def _check_poprun(config: Config, launch: Launch) -> None:
    """Raise unless the replicas and IPUs that poprun reserves fit the configuration."""
    local, count = launch.local_replicas, launch.world_size
    if local is None:
        return
    if local * count != config.batch.replicas:
        raise ConfigError(
            f"batch.replicas={config.batch.replicas}, but poprun started {count} instances"
            f" x {local} replicas. Give the same number to both: poprun"
            f" --num-replicas {config.batch.replicas}."
        )
    own = config.batch.eval_replicas
    if own not in (None, config.batch.replicas):
        raise ConfigError(
            f"batch.eval_replicas={own}, but poprun fixes the replicas of both graphs. Leave it"
            f" out, or set batch.replicas={own} and poprun --num-replicas {own}."
        )
    stages, eval_stages = config.pipeline.layers_per_stage, eval_layers(config)
    if len(stages) != len(eval_stages):
        raise ConfigError(
            f"pipeline.eval_layers_per_stage={eval_stages} needs {len(eval_stages)} IPUs per"
            f" replica, training {len(stages)}; poprun reserves one number of IPUs per replica."
            " Use the same number of stages for both."
        )
    if local == 1 and config.engine.replicated_tensor_sharding:
        raise ConfigError(
            "engine.replicated_tensor_sharding=true shards over the replicas of a process, and"
            f" each of the {count} processes has one. Set it to false, or start fewer: poprun"
            f" --num-instances {max(1, count // 2)}."
        )


def _check_same_device(choice: EngineChoice, device: DeviceChoice, launch: Launch) -> None:
    """Raise unless all processes use the same engine, kind of device and precision."""
    differing = coordinator(launch).differences(
        "device",
        {
            "engine.name": choice.name,
            "engine.device": device.device.type,
            "engine.precision": device.precision,
        },
    )
    if differing:
        raise ConfigError(
            f"this host's device differs from that of the first process: {'; '.join(differing)}."
            " Set these fields explicitly instead of auto."
        )


def check_pipelining(what: str) -> None:
    """Raise EngineUnavailable if torch is too old for the pipeline engine."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _PIPELINING:
        needed = ".".join(map(str, _PIPELINING))
        raise EngineUnavailable(
            f"{what} needs torch {needed} or later; this is {torch.__version__}."
            " Use engine.name=torch, which is data parallel under torchrun."
        )
