"""Config -> poptorch.Options and poptorch.optim, one field a line; and what PopTorch is there.

Types are exact everywhere: PopTorch looks a PopART option up by the Python type of its value. Every
entry is explained in docs/ipu.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
from torch import nn

from cxr_vit.config.ipu_rules import eval_layers, process_problem, reserved_ipus
from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.engines.optim import parameter_groups

if TYPE_CHECKING:
    import poptorch

__all__ = [
    "inference_options",
    "moment_dtypes",
    "poptorch_optimizer",
    "poptorch_problem",
    "training_options",
]


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

_IPU_VERSIONS = {"mk2": 2, "c600": 21}

#: popart::AccumulateOuterFragmentSchedule::OverlapMemoryOptimized
_OVERLAP_MEMORY_OPTIMIZED = 3

#: popart::SubgraphCopyingStrategy::JustInTime
_JUST_IN_TIME = 1


class Problem(NamedTuple):
    """What was found, and what to do about it."""

    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.found}. {self.remedy}."


def poptorch_problem(
    config: Config, *, local_replicas: Optional[int] = None, offline: bool = False
) -> Optional[Problem]:
    """Say why the poptorch engine cannot run here and what to do, or return None.

    Parameters
    ----------
    config
        The number of IPUs follows from it.
    local_replicas
        Replicas of this process under poprun; None for all.
    offline
        Whether only to compile, which takes the SDK and no IPU.
    """
    elsewhere = "use engine.name=torch (this machine's GPU or CPU)"
    try:
        import poptorch
    except AssertionError as error:  # PopTorch's own check of torch's version
        pins = "Install the pins beside the SDK: pip install -r requirements-sdk34.txt"
        return Problem(str(error), pins)
    except ImportError:
        return Problem(
            "PopTorch is not installed or its SDK is not enabled",
            "Engine 'poptorch' needs the Poplar SDK's PopTorch (3.3 or 3.4): enable the SDK with"
            f" source <sdk>/enable (docs/ipu.md), or {elsewhere}",
        )
    stages = max(len(config.pipeline.layers_per_stage), len(eval_layers(config)))
    replicas = local_replicas or config.batch.replicas
    too_many = process_problem(config, replicas)
    if too_many:
        found, _, remedy = str(too_many).partition(". ")
        return Problem(found, remedy.rstrip("."))
    if offline:
        return None
    if os.environ.get("POPTORCH_IPU_MODEL", "0") not in ("", "0"):
        return Problem(
            "POPTORCH_IPU_MODEL asks for the IPU Model, a simulator without executable cache or"
            " several processes, far too slow for a ViT",
            f"Unset it, or {elsewhere}; to compile without an IPU: train.py --compile-only",
        )
    if not poptorch.ipuHardwareIsAvailable():
        return Problem(
            "PopTorch is there, but no IPU answers",
            f"Check `gc-monitor` and the partition (vipu), or {elsewhere}; to compile without an"
            " IPU: train.py --compile-only",
        )
    wanted = reserved_ipus(stages, replicas)
    if not poptorch.ipuHardwareIsAvailable(wanted):
        return Problem(
            f"{stages} stages x {replicas} replicas take {wanted} IPUs, and there are fewer here",
            "Check `gc-monitor` and the partition (vipu), lower batch.replicas, or cut"
            " pipeline.layers_per_stage into fewer stages",
        )
    return None


def training_options(
    config: Config,
    *,
    precision: str,
    cache: Optional[str],
    offline: bool = False,
    by_poprun: bool = False,
) -> poptorch.Options:
    """Make the options of the training graph.

    Parameters
    ----------
    config
        The configuration.
    precision
        ``"fp32"`` or ``"fp16"``: what `engine.precision` came to.
    cache
        Folder of compiled graphs.
    offline
        Whether only to compile.
    by_poprun
        Whether poprun started this process.
    """
    import poptorch

    batch, engine = BatchPlan.from_section(config.batch), config.engine
    layers = config.pipeline.layers_per_stage
    options = _shared(config, layers, precision, cache, offline, by_poprun)
    options.deviceIterations(batch.device_iterations)
    options.Training.gradientAccumulation(batch.gradient_accumulation)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    options.Training.setAutomaticLossScaling(config.optim.loss_scaling == "auto")
    # The loss of every micro-batch, 4 bytes each: Final would give one of them, Sum no update's.
    options.outputMode(poptorch.OutputMode.All)
    options.setExecutionStrategy(_strategy(config.pipeline.execution))
    options.Precision.enableStochasticRounding(engine.stochastic_rounding and precision == "fp16")
    moments = poptorch.TensorLocationSettings()
    moments.useOnChipStorage(engine.optimizer_state_on_chip)
    moments.useReplicatedTensorSharding(engine.replicated_tensor_sharding)
    options.TensorLocations.setOptimizerLocation(moments)
    popart = options._Popart
    # What Graphcore's own ViT sets: overlap the update with the exchange, copy late, free early.
    popart.set("disableGradAccumulationTensorStreams", True)
    if config.optim.max_grad_norm is None:  # else PopTorch chooses one that can clip
        popart.set("accumulateOuterFragmentSettings.schedule", _OVERLAP_MEMORY_OPTIMIZED)
        popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"])
    popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)
    _set_popart_options(options, config)
    return options


def inference_options(
    config: Config,
    *,
    precision: str,
    cache: Optional[str],
    offline: bool = False,
    by_poprun: bool = False,
) -> poptorch.Options:
    """Make the options of the inference graph; parameters as for `training_options`."""
    import poptorch

    options = _shared(config, eval_layers(config), precision, cache, offline, by_poprun)
    options.deviceIterations(config.batch.eval_device_iterations)
    options.outputMode(poptorch.OutputMode.All)
    options.setExecutionStrategy(_strategy(config.pipeline.eval_execution))
    # A score must not depend on chance.
    options.Precision.enableStochasticRounding(False)
    _set_popart_options(options, config)
    return options


def _shared(
    config: Config,
    layers: List[int],
    precision: str,
    cache: Optional[str],
    offline: bool,
    by_poprun: bool,
) -> poptorch.Options:
    """Make options with what training and inference have in common."""
    engine = config.engine
    options = _new_options(config, stages=len(layers), by_poprun=by_poprun)
    options.autoRoundNumIPUs(True)
    options.randomSeed(config.run.seed)
    partials = engine.partials if precision == "fp16" else "fp32"
    options.Precision.setPartialsType(_DTYPES[partials])
    options.Precision.enableFloatingPointExceptions(engine.floating_point_exceptions)
    proportions = config.pipeline.available_memory_proportion
    if proportions is not None:
        each = proportions if isinstance(proportions, list) else [proportions] * len(layers)
        options.setAvailableMemoryProportion(
            {f"IPU{ipu}": float(each[ipu]) for ipu in range(len(layers))}
        )
    if cache is not None or os.environ.get("POPTORCH_CACHE_DIR"):  # which PopTorch reads itself
        options.enableExecutableCaching(cache)
    if offline:
        options.useOfflineIpuTarget(_IPU_VERSIONS[engine.ipu_version])
    options.logCycleCount(engine.log_cycles)
    options.enableSyntheticData(engine.synthetic_data)
    popart = options._Popart
    popart.set("defaultPrefetchBufferingDepth", engine.prefetch_depth)
    popart.set("subgraphCopyingStrategy", _JUST_IN_TIME)
    _set_mapping(
        options,
        "engineOptions",
        {"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"},
    )
    if engine.profile_dir is not None:
        options.enableProfiling(engine.profile_dir)  # adds to the engine options of above
    return options


def _new_options(config: Config, *, stages: int, by_poprun: bool) -> poptorch.Options:
    """Make empty options; under `poprun` popdist's, which know the replicas themselves."""
    import poptorch

    if by_poprun:
        import popdist.poptorch

        return popdist.poptorch.Options(ipus_per_replica=stages)
    options = poptorch.Options()
    options.replicationFactor(config.batch.replicas)
    return options


def _strategy(execution: str) -> Any:
    """Make a block's stage the IPU that it names.

    A list of `poptorch.Stage` would say the same, but such options cannot be pickled, and an
    asynchronous loader's process gets them that way.
    """
    import poptorch

    same = poptorch.AutoStage.SameAsIpu
    if execution == "sharded":
        return poptorch.ShardedExecution(same)
    return poptorch.PipelinedExecution(same)


def _set_popart_options(options: poptorch.Options, config: Config) -> None:
    """Let the user's own settings win; mappings are added to, entry by entry."""
    for name, value in config.engine.popart_options.items():
        if isinstance(value, dict):
            _set_mapping(options, name, value)
        else:
            options._Popart.set(name, value)


def _set_mapping(options: poptorch.Options, name: str, entries: Dict[str, str]) -> None:
    """Add to a mapping: to set it would erase what is there."""
    options._Popart.set(name, {**options._Popart.options.get(name, {}), **entries})


def moment_dtypes(config: Config) -> Dict[str, torch.dtype]:
    """Return PopART's moment -> the dtype it is held in."""
    return {
        "Accl1": _DTYPES[config.optim.first_moment],
        "Accl2": _DTYPES[config.optim.second_moment],
    }


def poptorch_optimizer(
    parameters: Iterable[Tuple[str, nn.Parameter]], config: Config
) -> poptorch.optim.Optimizer:
    """Make PopTorch's AdamW, LAMB or SGD with this project's groups.

    What is passed to the constructor can be changed later; what is left out is compiled in.
    """
    from poptorch import optim as poptorch_optim

    optim = config.optim
    groups = parameter_groups(parameters, optim)
    shared: Dict[str, Any] = {
        "lr": optim.lr,
        "weight_decay": optim.weight_decay,
        "loss_scaling": 1.0 if optim.loss_scaling == "auto" else optim.loss_scaling,
        "accum_type": _DTYPES[optim.accumulator],
    }
    if optim.name == "sgd":
        return poptorch_optim.SGD(
            groups,
            momentum=optim.momentum,
            velocity_accum_type=_DTYPES[optim.first_moment],
            use_combined_accum=False,
            **shared,
        )
    shared["betas"] = (optim.beta1, optim.beta2)
    shared["eps"] = optim.eps
    shared["first_order_momentum_accum_type"] = _DTYPES[optim.first_moment]
    shared["second_order_momentum_accum_type"] = _DTYPES[optim.second_moment]
    if optim.name == "lamb":
        return poptorch_optim.LAMB(groups, **shared)
    clip = float("inf") if optim.max_grad_norm is None else optim.max_grad_norm
    return poptorch_optim.AdamW(groups, max_grad_norm=clip, **shared)
