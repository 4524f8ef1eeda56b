"""Chooses and builds the engine a config asks for."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from cxr_vit.config.ipu_rules import check_ipu
from cxr_vit.config.rules import check_processes
from cxr_vit.config.schema import Config
from cxr_vit.engines.base import Engine
from cxr_vit.engines.devices import Placement, choose
from cxr_vit.engines.ipu.engine import PopTorchEngine
from cxr_vit.engines.ipu.instances import Instances
from cxr_vit.engines.ipu.options import poptorch_problem
from cxr_vit.engines.process_group import Processes, same_everywhere
from cxr_vit.engines.processes import Launch
from cxr_vit.engines.torch_engine import TorchEngine
from cxr_vit.errors import ConfigError, EngineUnavailable
from cxr_vit.model.stages import StagedViT

__all__ = ["EngineChoice", "build_engine", "choose_engine"]


#: The oldest torch that works here: 2.6 does not wait for all that 1F1B sends over
#: gloo, and 2.8 cannot score several stages a process.
_PIPELINING = (2, 10)


class EngineChoice(NamedTuple):
    """Which engine, and why in words; the model is built for it.

    `local_replicas` are those of this process under poprun.
    """

    name: str
    reason: str
    local_replicas: Optional[int] = None

    @property
    def is_ipu(self) -> bool:
        """Whether the model runs on IPUs."""
        return self.name == "poptorch"


def choose_engine(config: Config, *, offline: bool = False) -> EngineChoice:
    """Choose the engine of `engine.name`.

    `auto` takes IPUs where PopTorch imports and enough of them answer, else torch's devices. Who
    names a torch device (`engine.device`) means that one.

    Parameters
    ----------
    config
        The configuration.
    offline
        Whether only to compile for IPUs.

    Raises
    ------
    EngineUnavailable
        If the IPUs asked for cannot be had.
    ConfigError
        If IPUs are there, but PopTorch would refuse the configuration; if torchrun started another
        number of processes than the configuration needs.
    """
    choice = _choose(config, offline)
    launch = Launch.from_environment()
    if not choice.is_ipu:
        check_processes(config, choice.name, launch.world_size if launch.is_connected else 1)
    elif launch.is_connected:
        raise EngineUnavailable(
            "IPUs answer here, and their processes are started by poprun, not by torchrun"
            " (engine.name=torch or pipeline leaves the IPUs alone)."
        )
    return choice


def _choose(config: Config, offline: bool) -> EngineChoice:
    engine = config.engine
    if engine.name == "pipeline" and not offline:
        _check_pipelining()
        return EngineChoice("pipeline", "engine.name=pipeline")
    if engine.name == "torch" and not offline:
        return EngineChoice("torch", "engine.name=torch")
    if engine.name == "auto" and engine.device != "auto" and not offline:
        return EngineChoice("torch", "engine.device is one of torch's")
    problem = poptorch_problem(config, offline=offline)
    if problem is None:
        hint = " (IPUs answer here; engine.name=torch leaves them alone.)"
        hint = hint if engine.name == "auto" and not offline else ""
        replicas = Instances.from_environment().local_replicas
        check_ipu(config, hint, replicas=replicas)
        why = "IPUs answer" if engine.name == "auto" else "engine.name=poptorch"
        return EngineChoice("poptorch", "--compile-only" if offline else why, replicas)
    if engine.name == "poptorch" or offline:
        raise EngineUnavailable(str(problem))
    return EngineChoice("torch", f"no IPU: {problem.found}")


def build_engine(
    config: Config,
    model: StagedViT,
    choice: Optional[EngineChoice] = None,
    *,
    offline: bool = False,
) -> Engine:
    """Build the chosen engine.

    Parameters
    ----------
    config
        The configuration.
    model
        Built `for_ipu` if the choice is.
    choice
        Of `choose_engine`; None to choose here.
    offline
        Whether only to compile for IPUs.

    Raises
    ------
    EngineUnavailable
        If it cannot run here.
    """
    choice = choice or choose_engine(config)
    if choice.is_ipu:
        return PopTorchEngine(model, config, reason=choice.reason, offline=offline)
    placement = choose(config.engine, Launch.from_environment().local_rank)
    _check_alike(choice, placement)
    placement = placement._replace(reason=f"{choice.reason}; {placement.reason}")
    processes = Processes(placement.device, config.engine.timeout_s)
    if choice.name == "pipeline":
        from cxr_vit.engines.pipeline_engine import PipelineEngine

        return PipelineEngine(model, config, placement, processes)
    return TorchEngine(model, config, placement, processes)


def _check_alike(choice: EngineChoice, placement: Placement) -> None:
    """Raise unless all processes compute on the same kind of device in the same arithmetic."""
    differing = same_everywhere(
        "placement",
        {
            "engine.name": choice.name,
            "engine.device": placement.device.type,
            "engine.precision": placement.precision,
        },
    )
    if differing:
        raise ConfigError(
            f"this host computes otherwise than the first process's: {'; '.join(differing)}. Set"
            " them instead of auto."
        )


def _check_pipelining() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _PIPELINING:
        needed = ".".join(map(str, _PIPELINING))
        raise EngineUnavailable(
            f"engine.name=pipeline needs torch {needed} or later; this is {torch.__version__}."
            " Use engine.name=torch, which is data parallel under torchrun."
        )
