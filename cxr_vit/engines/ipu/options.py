"""Configuration -> poptorch.Options, and whether PopTorch can run here.

Values have exact types: PopTorch looks PopART's options up by the Python type of the value.
docs/ipu.md, section 4, explains every entry.
"""

from __future__ import annotations

import math
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch

from cxr_vit.config.ipu_rules import (
    MOST_IPUS,
    eval_layers,
    eval_proportion,
    pipelines,
    process_problem,
    reserved_ipus,
)
from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.poptorch_options import ENUMS, MARK_CONSTANT, options_of
from cxr_vit.config.schema import Config
from cxr_vit.errors import ConfigError, Problem

if TYPE_CHECKING:
    import poptorch


DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_IPU_VERSIONS = {"mk2": 2, "c600": 21}
#: popart::AccumulateOuterFragmentSchedule::OverlapMemoryOptimized
_OVERLAP_MEMORY_OPTIMIZED = 3
#: popart::RecomputationType::None
_NO_RECOMPUTATION = 0
#: popart::SubgraphCopyingStrategy::JustInTime
_JUST_IN_TIME = 1
#: Bytes of a protobuf message at most; PopTorch passes the graph in one (CompilerOptions.hpp).
PROTOBUF_LIMIT = 2**31
#: Options about a device, which --compile-only has not.
_DEVICE = ("connectionType", "useIpuId")


def poptorch_problem(
    config: Config, *, local_replicas: Optional[int] = None, offline: bool = False
) -> Optional[Problem]:
    """Return why the poptorch engine cannot run here, or None.

    Parameters
    ----------
    local_replicas
        Replicas of this process under poprun; None for all.
    offline
        Whether to compile only, which needs the SDK but no IPU.
    """
    alternative = "use engine.name=torch (this machine's GPU or CPU)"
    try:
        import poptorch
    except AssertionError as error:  # PopTorch checks the version of torch
        pins = "Install the pins beside the SDK: pip install -r requirements-sdk34.txt."
        return Problem("PopTorch", f"cannot be imported: {error}.", advice=pins)
    except ImportError:
        return Problem(
            "PopTorch",
            "is not installed or its SDK is not enabled.",
            "Engine 'poptorch' needs the Poplar SDK's PopTorch (3.3 or 3.4).",
            f"Enable the SDK with source <sdk>/enable (docs/ipu.md), or {alternative}.",
        )
    stages, replicas = max(pipelines(config, local_replicas), key=math.prod)
    too_many = process_problem(config, local_replicas)
    if too_many or offline:
        return too_many
    if os.environ.get("POPTORCH_IPU_MODEL", "0") not in ("", "0"):
        return Problem(
            "POPTORCH_IPU_MODEL",
            "selects the IPU Model, a simulator without executable cache or several processes, far"
            " too slow for a ViT.",
            f"Unset it, or {alternative}.",
            "To compile without an IPU: train.py --compile-only.",
        )
    needed = reserved_ipus(stages, replicas)
    if poptorch.ipuHardwareIsAvailable(needed):
        return None
    if not any_ipu_answers():
        return Problem(
            "PopTorch",
            "is installed, but no IPU answers.",
            f"Check `gc-monitor` and the partition (vipu), or {alternative}.",
            "To compile without an IPU: train.py --compile-only.",
        )
    return Problem(
        f"{stages} stages x {replicas} replicas",
        f"need {needed} IPUs, and fewer answer here.",
        "Check `gc-monitor` and the partition (vipu), lower batch.replicas, or use fewer stages"
        " in pipeline.layers_per_stage.",
    )


def any_ipu_answers() -> bool:
    """Whether there is a device of any size; a fixed partition may have those of one size only."""
    import poptorch

    sizes = [2**power for power in range(MOST_IPUS.bit_length())]
    return any(poptorch.ipuHardwareIsAvailable(size) for size in sizes)


def on_hardware() -> bool:
    """Whether IPUs compute, not a stand-in for PopTorch or for its compiled core, or a model."""
    import poptorch

    core = getattr(poptorch, "poptorch_core", None)
    is_compiled = str(getattr(core, "__file__", "")).endswith(tuple(EXTENSION_SUFFIXES))
    return is_compiled and any_ipu_answers()


def graph_options(
    config: Config,
    batch: BatchPlan,
    *,
    precision: str,
    cache: Optional[str],
    offline: bool = False,
    by_poprun: bool = False,
) -> Tuple[poptorch.Options, poptorch.Options]:
    """Make the options of the training graph and those of the inference graph.

    Parameters
    ----------
    precision
        ``"fp32"`` or ``"fp16"``: the resolved `engine.precision`.
    cache
        Folder of compiled graphs.
    offline
        Whether to compile only.
    by_poprun
        Whether poprun started this process.
    """
    both = []
    for stages, replicas in (
        (len(config.pipeline.layers_per_stage), batch.replicas),
        (len(eval_layers(config)), batch.eval_replicas),
    ):
        options = _new_options(replicas, stages=stages, by_poprun=by_poprun)
        _set_common(options, config, precision)
        if cache is not None or os.environ.get("POPTORCH_CACHE_DIR"):  # PopTorch reads it too
            options.enableExecutableCaching(cache)
        if offline:
            options.useOfflineIpuTarget(_IPU_VERSIONS[config.engine.ipu_version])
        both.append(options)
    training, inference = both
    _set_training(training, config, batch, precision)
    _set_inference(inference, config, batch)
    for graph, options in (("training", training), ("inference", inference)):
        for name, value in options_of(config.engine.poptorch_options, graph).items():
            if not offline or name not in _DEVICE:
                _set_users(options, name, value)
    return training, inference


def save_weights_apart(options: poptorch.Options, file: Path) -> None:
    """Have PopART write the initial weights to a file, not into the graph's protobuf message."""
    options._Popart.set("saveInitializersToFile", str(file))


def _new_options(replicas: int, *, stages: int, by_poprun: bool) -> poptorch.Options:
    """Make empty options; under `poprun` those of popdist, which knows the replicas."""
    import poptorch

    if by_poprun:
        import popdist.poptorch

        return popdist.poptorch.Options(ipus_per_replica=stages)
    options = poptorch.Options()
    options.replicationFactor(replicas)
    return options


def _set_common(options: poptorch.Options, config: Config, precision: str) -> None:

    engine = config.engine
    options.autoRoundNumIPUs(True)
    options.randomSeed(config.run.seed)
    partials = engine.partials if precision == "fp16" else "fp32"
    options.Precision.setPartialsType(DTYPES[partials])
    options.Precision.enableFloatingPointExceptions(engine.floating_point_exceptions)
    options.logCycleCount(engine.log_cycles)
    options.enableSyntheticData(engine.synthetic_data)
    options._Popart.set("defaultBufferingDepth", engine.prefetch_depth)
    options._Popart.set("subgraphCopyingStrategy", _JUST_IN_TIME)
    _add_to_mapping(
        options,
        "engineOptions",
        {"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"},
    )
    if engine.profile_dir is not None:
        options.enableProfiling(engine.profile_dir)  # adds to these engine options


def _set_training(
    options: poptorch.Options, config: Config, batch: BatchPlan, precision: str
) -> None:
    import poptorch

    engine, popart = config.engine, options._Popart
    options.deviceIterations(batch.device_iterations)
    # The loss of an update is the mean over its micro-batches: their sum comes back, or, as it
    # would add up over device iterations, each of them. Final would return that of one.
    one_update = batch.device_iterations == 1
    options.outputMode(poptorch.OutputMode.Sum if one_update else poptorch.OutputMode.All)
    _set_memory_proportion(
        options, config.pipeline.available_memory_proportion, config.pipeline.layers_per_stage
    )
    options.Training.gradientAccumulation(batch.gradient_accumulation)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    options.Training.setAutomaticLossScaling(config.optim.loss_scaling == "auto")
    options.setExecutionStrategy(_strategy(config.pipeline.execution))
    options.Precision.enableStochasticRounding(engine.stochastic_rounding and precision == "fp16")
    moments = poptorch.TensorLocationSettings()
    moments.useOnChipStorage(engine.optimizer_state_on_chip)
    moments.useReplicatedTensorSharding(engine.replicated_tensor_sharding)
    options.TensorLocations.setOptimizerLocation(moments)
    # As in Graphcore's ViT: overlap the update with the exchange, copy late, free early.
    popart.set("disableGradAccumulationTensorStreams", True)
    if config.pipeline.recompute == "none":  # otherwise PopTorch selects that of a pipeline
        popart.set("autoRecomputation", _NO_RECOMPUTATION)
    if config.optim.max_grad_norm is None:  # otherwise PopTorch selects one that supports clipping
        popart.set("accumulateOuterFragmentSettings.schedule", _OVERLAP_MEMORY_OPTIMIZED)
        popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"])
    popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)


def _set_inference(options: poptorch.Options, config: Config, batch: BatchPlan) -> None:
    import poptorch

    pipeline = config.pipeline
    options.deviceIterations(batch.eval_device_iterations)
    options.outputMode(poptorch.OutputMode.All)  # the logits of every image
    _set_memory_proportion(options, eval_proportion(config), eval_layers(config))
    options.setExecutionStrategy(_strategy(pipeline.eval_execution))
    options.Precision.enableStochasticRounding(False)  # scores must be deterministic


def _set_memory_proportion(
    options: poptorch.Options,
    given: Union[float, Sequence[float], None],
    layers: Sequence[int],
) -> None:
    if given is None:
        return
    proportions = [given] * len(layers) if isinstance(given, float) else given
    options.setAvailableMemoryProportion(
        {f"IPU{ipu}": float(proportions[ipu]) for ipu in range(len(layers))}
    )


def _strategy(execution: str) -> Any:
    """Return a strategy in which the stage of a block is its IPU.

    A list of `poptorch.Stage` would be equivalent, but such options cannot be pickled for an
    asynchronous loader's process.
    """
    import poptorch

    same = poptorch.AutoStage.SameAsIpu
    if execution == "sharded":
        return poptorch.ShardedExecution(same)
    return poptorch.PipelinedExecution(same)


def _set_users(options: poptorch.Options, name: str, value: Any) -> None:
    """Set an option of the user, which wins; mappings are merged entry by entry."""
    import poptorch

    if name in _OWN_WAY:
        _OWN_WAY[name](options, value)
        return
    group, _, setter = name.rpartition(".")
    owner = getattr(options, group) if group else options
    if isinstance(value, dict):
        value = _location(owner, setter, value)
    elif name in ENUMS:
        value = getattr(getattr(poptorch, ENUMS[name]), value)
    try:
        getattr(owner, setter)(value)
    except RuntimeError as error:  # popdist refuses what differs between processes
        raise ConfigError(f"engine.poptorch_options: {name}={value}: {error}.") from error


def _location(owner: Any, setter: str, given: Dict[str, Any]) -> poptorch.TensorLocationSettings:
    """Return the location of a kind of tensor so far, with the settings given."""
    import poptorch

    settings = poptorch.TensorLocationSettings()
    entry = f"location_{setter[len('set') : -len('Location')].lower()}"
    if owner.exists(entry):
        settings.createOrSet(**getattr(owner, entry))
    for name, value in given.items():
        getattr(settings, name)(value)
    return settings


def _set_popart(options: poptorch.Options, given: Dict[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, dict):
            _add_to_mapping(options, name, value)
        else:
            options._Popart.set(name, value)


def _set_patterns(options: poptorch.Options, given: Dict[str, Any]) -> None:
    patterns = {name: value for name, value in given.items() if name != "level"}
    level = {"level": given["level"]} if "level" in given else {}
    options._Popart.setPatterns(patterns, **level)


def _set_dithering(options: poptorch.Options, use: bool) -> None:
    # PopTorch's setter would take our partials type away, and writes "1" for PopLibs' "true".
    _add_to_mapping(options, "convolutionOptions", {"enableConvDithering": str(use).lower()})


def _disable_namescope(options: poptorch.Options, disable: bool) -> None:
    if disable:
        options.disableModuleNamescope()


def _add_to_mapping(options: poptorch.Options, name: str, entries: Dict[str, str]) -> None:
    options._Popart.set(name, {**options._Popart.options.get(name, {}), **entries})


#: Setters that are not called with the value as it is.
_OWN_WAY: Dict[str, Callable[[Any, Any], Any]] = {
    "Training.setConvolutionDithering": _set_dithering,
    "_Popart.set": _set_popart,
    "_Popart.setEngineOptions": lambda options, given: _add_to_mapping(
        options, "engineOptions", given
    ),
    "_Popart.setPatterns": _set_patterns,
    "appendToLocationExcludes": lambda options, given: options.appendToLocationExcludes(*given),
    "disableModuleNamescope": _disable_namescope,
    MARK_CONSTANT: lambda options, names: None,  # of the optimizer: mark_constants
}
