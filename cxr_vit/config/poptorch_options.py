"""`engine.poptorch_options`: the options of PopTorch that it may set, and their arguments.

PopTorch checks names and Python types of PopART's options only when it compiles: `1` for `True`, or
a misspelt name, fails half an hour later. Names are those of PopTorch 3.4: the setters of its
python/options.py and the options that SessionOptions.cpp registers; names of patterns are PopART's.
A configuration may come from anybody, so nothing that runs code is allowed.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

from cxr_vit.errors import suggestion

SCOPES = ("both", "training", "inference")

MARK_CONSTANT = "VariableAttributes.markAsConstant"
MEAN_STRATEGY = "Training.setMeanAccumulationAndReplicationReductionStrategy"
#: Values of `VariableAttributes.markAsConstant` by optimizer; PopTorch compiles the others in.
CONSTANTS = {
    "adamw": ("betas", "eps", "loss_scaling", "weight_decay"),
    "lamb": ("betas", "eps", "loss_scaling", "max_weight_norm", "weight_decay"),
    "sgd": ("loss_scaling", "momentum", "weight_decay"),
}
#: Setters whose argument is a member of an enumeration of PopTorch.
ENUMS = {
    MEAN_STRATEGY: "MeanReductionStrategy",
    "connectionType": "ConnectionType",
    "syncPattern": "SyncPattern",
}


# Kinds of arguments: the words of a message -> what reads such an argument. The loader passes text.


def _text(value: Any) -> str:
    if value is None or isinstance(value, (list, dict)):
        raise TypeError(value)
    return str(value)


def _name(value: Any) -> str:
    """Return a name that PopTorch makes a part of a path."""
    name = _text(value)
    if not name or "/" in name or name.startswith("."):
        raise ValueError(name)
    return name


def _flag(value: Any) -> bool:
    return {"true": True, "false": False}[_text(value).lower()]


def _number(value: Any) -> float:
    number = float(_text(value))
    if not math.isfinite(number):
        raise ValueError(number)
    return number


def _integer(least: int, most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = int(_text(value))
        if not least <= number <= most:
            raise ValueError(number)
        return number

    return read


def _io_tiles(value: Any) -> int:
    number = _integer(32, 192)(value)
    if number % 2:
        raise ValueError(number)
    return number


def _list(read: Callable[[Any], Any]) -> Callable[[Any], List[str]]:
    def read_all(value: Any) -> List[str]:
        if not isinstance(value, list):
            raise TypeError(value)
        return [str(read(item)) for item in value]

    return read_all


def _mapping(value: Any) -> Dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError(value)
    return {str(key): _text(item) for key, item in value.items()}


def _one_of(*names: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        name = _text(value).rpartition(".")[2]  # also poptorch.SyncPattern.Full
        return {known.lower(): known for known in names}[name.lower()]

    return read


_CONSTANTS = sorted({name for names in CONSTANTS.values() for name in names})
_CONSTANT = f"a list of {', '.join(_CONSTANTS)} (the schedule changes lr)"
_COUNT = _integer(0, 2**63 - 1)
_READERS: Dict[str, Callable[[Any], Any]] = {
    "true or false": _flag,
    "text": _text,
    "a name without /": _name,
    "a number": _number,
    "an integer >= 0": _COUNT,
    "an integer >= 0, or null": lambda value: None if value is None else _COUNT(value),
    "0 or 1": _integer(0, 1),
    "an integer from 0 to 2": _integer(0, 2),
    "an integer from 0 to 3": _integer(0, 3),
    "an integer from 1 to 3": _integer(1, 3),
    "an even integer from 32 to 192": _io_tiles,
    "a list of text": _list(_text),
    "a list of integers >= 0": _list(_COUNT),
    "a list of 0 and 1": _list(_integer(0, 1)),
    "a mapping of text": _mapping,
    "greedy, fifo or random": _one_of("greedy", "fifo", "random"),
    "Always or OnDemand": _one_of("Always", "OnDemand"),
    "Full, SinglePipeline or ReplicaAndLadder": _one_of(
        "Full", "SinglePipeline", "ReplicaAndLadder"
    ),
    "Running or Post": _one_of("Running", "Post"),
    _CONSTANT: _list(_one_of(*_CONSTANTS)),
}


def _by_name(groups: Dict[str, str]) -> Dict[str, str]:
    """Return name -> what is said of the group it is in."""
    return {name: said for said, names in groups.items() for name in names.split()}


class Table(NamedTuple):
    """Names of one level: what they are, those allowed, and why others are refused."""

    what: str
    #: Name -> kind of its argument.
    allowed: Dict[str, str]
    #: Name -> the rest of a sentence that begins with it.
    refused: Dict[str, str]


def _set_by(keys: Dict[str, str]) -> Dict[str, str]:
    return {name: f"is set by {key}" for name, key in keys.items()}


_BY_POPRUN = "is set by poprun"
_NO_EFFECT = "has no effect in PopTorch 3.4"
_PHASED = "belongs to phased execution, and the engine runs pipelined or sharded"
_EXPLICIT = "is for explicit pipelining, which PopTorch 3.4 does not support (Compiler.cpp:715)"
_RUNS_CODE = "compiles code from a file, and a configuration must not run code"

_SETTERS = Table(
    "option",
    _by_name(
        {
            "true or false": """
                Training.setConvolutionDithering broadcastBuffers disableModuleNamescope
                enableStableNorm relaxOptimizerAttributesChecks showCompilationProgressBar
            """,
            "text": "logDir",
            "a name without /": "modelName",
            "an integer >= 0": "useIpuId",
            "an integer >= 0, or null": "maxRepeatLogs",
            "an even integer from 32 to 192": "TensorLocations.numIOTiles",
            "a list of text": """
                appendToLocationExcludes sourceLocationExcludes updatableNamedBuffers
            """,
            "a mapping of text": "_Popart.setEngineOptions",
            "Always or OnDemand": "connectionType",
            "Full, SinglePipeline or ReplicaAndLadder": "syncPattern",
            "Running or Post": MEAN_STRATEGY,
            _CONSTANT: MARK_CONSTANT,
            "a mapping of PopART options": "_Popart.set",
            "a mapping of patterns": "_Popart.setPatterns",
            "a mapping of setters": """
                TensorLocations.setAccumulatorLocation TensorLocations.setActivationLocation
                TensorLocations.setOptimizerLocation TensorLocations.setWeightLocation
            """,
        }
    ),
    {
        **_set_by(
            {
                "Precision.enableFloatingPointExceptions": "engine.floating_point_exceptions",
                "Precision.enableStochasticRounding": "engine.stochastic_rounding",
                "Precision.setPartialsType": "engine.partials",
                "Training.gradientAccumulation": "batch.gradient_accumulation",
                "Training.setAutomaticLossScaling": "optim.loss_scaling=auto",
                "deviceIterations": "batch.device_iterations and batch.eval_device_iterations",
                "enableExecutableCaching": "engine.executable_cache",
                "enableProfiling": "engine.profile_dir",
                "enableSyntheticData": "engine.synthetic_data",
                "logCycleCount": "engine.log_cycles",
                "randomSeed": "run.seed",
                "replicationFactor": "batch.replicas and batch.eval_replicas",
                "setAvailableMemoryProportion": "pipeline.available_memory_proportion and"
                " pipeline.eval_available_memory_proportion",
                "setExecutionStrategy": "pipeline.execution and pipeline.eval_execution",
                "useOfflineIpuTarget": "train.py --compile-only and engine.ipu_version",
            }
        ),
        "Distributed.configureProcessId": _BY_POPRUN,
        "Distributed.disable": _BY_POPRUN,
        "Distributed.setEnvVarNames": _BY_POPRUN,
        "Jit.traceModel": _NO_EFFECT,
        "Precision.halfFloatCasting": _NO_EFFECT,
        "Precision.runningStatisticsAlwaysFloat": _NO_EFFECT,
        "Training.accumulationAndReplicationReductionType": "is fixed: gradients are means over"
        " micro-batches and replicas, as on the other engines",
        "VariableAttributes.markAsVariable": "is not needed: every attribute that"
        " markAsConstant takes is variable",
        "anchorTensor": "is refused: the engine reads only the model's result",
        "autoRoundNumIPUs": "is fixed: the engine counts on reserving a power of two IPUs",
        "from_json": "is refused: give each option by its own name",
        "inputReplicaGrouping": "is refused: each replica gets images of its own",
        "loadFromFile": "is refused: PopTorch runs the file as Python code"
        " (_options_config.py), and a configuration must not run code",
        "outputMode": "is fixed: the engine reads the loss of every update and the logits of"
        " every image",
        "useIpuModel": "is refused: the IPU Model, a simulator, is far too slow for a ViT",
    },
)

_POPART = Table(
    "PopART option",
    _by_name(
        {
            "true or false": """
                batchSerializationSettings.concatOnExecutionPhaseChange
                batchSerializationSettings.concatOnPipelineStageChange
                batchSerializationSettings.concatOnVirtualGraphChange decomposeGradSum
                delayVarUpdates disableGradAccumulationTensorStreams dotOpNames enableExplicitIR
                enableFullyConnectedPass enableInplaceAmbiguityChecking enableMergeExchange
                enableNonStableSoftmax enableOutlining enableOutliningCopyCostPruning
                enablePrefetchDatastreams enableSerializedMatmuls enableStableNorm
                enableSupportedDataTypeCasting ensureFp32LossScaleTensor
                exportPoplarComputationGraph exportPoplarVertexGraph groupHostSync
                groupNormStridedChannelGrouping opxAliasChecking opxModifyChecking
                rearrangeAnchorsOnHost rearrangeStreamsOnHost
                replicatedCollectivesSettings.mergeAllReduceCollectives
                replicatedCollectivesSettings.prepareScheduleForMergingCollectives
                scheduleNonWeightUpdateGradientConsumersEarly separateCallOpPdfs strictOpVersions
            """,
            "an integer >= 0": """
                automaticLossScalingSettings.updatePeriod batchSerializationSettings.factor
                compilationProgressTotal finalDotOp firstDotOp looseThresholdAtPeak
                mergeVarUpdateMemThreshold swapLimitScheduler
                transitiveClosureOptimizationThreshold
            """,
            "0 or 1": """
                automaticLossScalingSettings.gradientTensorTrackingMethod
                batchSerializationSettings.transformContext subgraphCopyingStrategy
            """,
            "an integer from 0 to 2": "batchSerializationSettings.method",
            "an integer from 0 to 3": """
                accumulateOuterFragmentSettings.schedule autodiffSettings.stitchStrategy
                batchSerializationSettings.batchSchedule mergeVarUpdate
            """,
            "a number": """
                automaticLossScalingSettings.binEdgeLocation
                automaticLossScalingSettings.thresholdUpperCountProportion outlineSequenceBreakCost
                outlineThreshold timeLimitScheduler
            """,
            "text": "serializedPoprithmsShiftGraphsDir",
            "greedy, fifo or random": "kahnTieBreaker",
            "a list of text": "dotChecks updatableNamedBuffers",
            "a list of 0 and 1": "hardwareInstrumentations",
            "a list of integers >= 0": "accumulateOuterFragmentSettings.excludedVirtualGraphs",
            "a mapping of text": """
                convolutionOptions engineOptions gclOptions lstmOptions matmulOptions reportOptions
            """,
        }
    ),
    {
        **_set_by(
            {
                "accumulationFactor": "batch.gradient_accumulation",
                "autoRecomputation": "pipeline.recompute",
                "automaticLossScalingSettings.enabled": "optim.loss_scaling=auto",
                "cachePath": "engine.executable_cache",
                "defaultBufferingDepth": "engine.prefetch_depth",
                "enableEngineCaching": "engine.executable_cache",
                "enableFloatingPointChecks": "engine.floating_point_exceptions",
                "enableGradientAccumulation": "batch.gradient_accumulation",
                "enablePipelining": "pipeline.execution",
                "enableReplicatedGraphs": "batch.replicas",
                "enableStochasticRounding": "engine.stochastic_rounding",
                "instrumentWithHardwareCycleCounter": "engine.log_cycles",
                "logDir": "logDir beside _Popart.set",
                "meanAccumulationAndReplicationReductionStrategy": f"{MEAN_STRATEGY} beside"
                " _Popart.set",
                "numIOTiles": "TensorLocations.numIOTiles beside _Popart.set",
                "partialsTypeMatMuls": "engine.partials",
                "syntheticDataMode": "engine.synthetic_data",
                "virtualGraphMode": "pipeline.execution",
            }
        ),
        "accumulationAndReplicationReductionType": "is fixed: gradients are means over"
        " micro-batches and replicas, as on the other engines",
        "aliasZeroCopy": _EXPLICIT,
        "compileEngine": "must stay true: a graph that is not compiled cannot run",
        "constantWeights": "must stay false: evaluation sends the inference graph new weights"
        " (PopART's session.cpp:544)",
        "customCodeletCompileFlags": _RUNS_CODE,
        "customCodelets": _RUNS_CODE,
        "defaultPrefetchBufferingDepth": "is deprecated and overwrites engine.prefetch_depth"
        " (PopART's sessionoptions.cpp:196)",
        "disableOptimizerStateTensorStreams": "must stay false: the moments would be lost at"
        " each validation and checkpoint (PopART's ir.cpp:2700)",
        "enableDistributedReplicatedGraphs": _BY_POPRUN,
        "enableExplicitMainLoops": _EXPLICIT,
        "enableLoadAndOffloadRNGState": "must stay true: checkpoints hold the random state"
        " (PopART's session.cpp:179)",
        "executionPhaseSettings.phases": _PHASED,
        "executionPhaseSettings.stages": _PHASED,
        "explicitRecomputation": _EXPLICIT,
        "globalReplicaOffset": _BY_POPRUN,
        "globalReplicationFactor": _BY_POPRUN,
        "saveInitializersToFile": "overwrites the file it names; the engine sets it for weights of"
        " over 2 GiB",
        "useHostCopyOps": _EXPLICIT,
    },
)

_PATTERNS = Table(
    "pattern of PopART",
    _by_name(
        {
            "an integer from 1 to 3": "level",
            "true or false": """
                ConvFlipWeightsDoubleFlip DecomposeBinaryConstScalar ExpandCast InPlace
                InitAccumulate LSTMOp LambSerialisedWeight NegativeOneScale
                NlllWithSoftmaxGradDirect OpToIdentity PackedDataBlock PadSum PostNRepl PreUniRepl
                RemoveUnnecessaryLossGradCast Slice2SliceSubsample SoftmaxGradDirect SplitGather
                SplitGradOpToConcat SplitOp SumToAdd TiedGather TiedGatherAccumulate
                TransposeToIdentityOrReshapePattern UpdateInplacePrioritiesForIpu UpsampleToResize
            """,
        }
    ),
    _by_name(
        {
            "is always on": """
                AllReduceToIdentity Atan2Arg0GradOp Atan2Arg1GradOp ConvDataGrad
                ConvFlipWeightsGradOp ConvTranspose CosGradOp CoshOp DivArg0GradOp DivArg1GradOp
                ExpGradOp Expm1GradOp FmodArg0GradOp Log1pGradOp LogGradOp LoopScanOut
                MatMulLhsGradOp MatMulOp MatMulRhsGradOp MulArgGradOp PowArg0GradOp PowArg1GradOp
                ReciprocalGradOp ScanToLoop SqrtGradOp SubtractArg1GradOp
            """
        }
    ),
)

_LOCATION = Table(
    "setter of TensorLocationSettings",
    _by_name(
        {
            "an integer >= 0": "minElementsForOffChip minElementsForReplicatedTensorSharding",
            "true or false": """
                useIOTilesToLoad useIOTilesToStore useOnChipStorage useReplicatedTensorSharding
            """,
        }
    ),
    {},
)
_OPTIMIZER_KEYS = {
    "useOnChipStorage": "engine.optimizer_state_on_chip",
    "useReplicatedTensorSharding": "engine.replicated_tensor_sharding",
}
_OPTIMIZER_LOCATION = _LOCATION._replace(
    allowed={
        name: _LOCATION.allowed[name] for name in _LOCATION.allowed if name not in _OPTIMIZER_KEYS
    },
    refused=_set_by(_OPTIMIZER_KEYS),
)

#: Setter -> the names of the mapping that it takes; "" for the setters themselves.
TABLES = {
    "": _SETTERS,
    "_Popart.set": _POPART,
    "_Popart.setPatterns": _PATTERNS,
    "TensorLocations.setAccumulatorLocation": _LOCATION,
    "TensorLocations.setActivationLocation": _LOCATION,
    "TensorLocations.setOptimizerLocation": _OPTIMIZER_LOCATION,
    "TensorLocations.setWeightLocation": _LOCATION,
}

#: Why a name belongs under `training`. A name that ends in a dot stands for all that begin with it.
_TRAINING_ONLY = _by_name(
    {
        "acts on training only": f"""
            {MARK_CONSTANT} {MEAN_STRATEGY} TensorLocations.setAccumulatorLocation
            TensorLocations.setOptimizerLocation Training.setConvolutionDithering
            accumulateOuterFragmentSettings. autodiffSettings. decomposeGradSum delayVarUpdates
            disableGradAccumulationTensorStreams ensureFp32LossScaleTensor looseThresholdAtPeak
            mergeVarUpdate mergeVarUpdateMemThreshold relaxOptimizerAttributesChecks
            replicatedCollectivesSettings.mergeAllReduceCollectives
            scheduleNonWeightUpdateGradientConsumersEarly
        """,
        "acts on training only: PopTorch passes no patterns to inference"
        " (Compiler.cpp:771)": "_Popart.setPatterns",
        "acts on training only: PopART refuses it in inference"
        " (automaticlossscaling.cpp:750)": "automaticLossScalingSettings.",
        "acts on training only: PopART refuses it in inference"
        " (contiguatecollectivesformerging.cpp:45)": """
            replicatedCollectivesSettings.prepareScheduleForMergingCollectives
        """,
    }
)
_INFERENCE_ONLY = {
    "enableExplicitIR": "makes the pipeline of training explicit, which PopTorch 3.4 does not"
    " support (Compiler.cpp:715)"
}
#: Why a name belongs under one graph, whichever.
_ONE_GRAPH = {
    "modelName": "names a graph: two graphs of one name share a folder of reports",
}


def _graph_problem(name: str, scope: str) -> str:
    """Return why a name cannot be given in a scope, or ""."""
    for graph, names in (("training", _TRAINING_ONLY), ("inference", _INFERENCE_ONLY)):
        for known, reason in names.items():
            found = name == known or (known.endswith(".") and name.startswith(known))
            if found and scope != graph:
                return f"{reason}. Give it under {graph}"
    if scope == "both" and name in _ONE_GRAPH:
        return f"{_ONE_GRAPH[name]}. Give it under training or inference"
    return ""


#: Entries of mappings of PopART -> the configuration key that sets them.
_OWN_ENTRIES = {
    ("convolutionOptions", "partialsType"): "engine.partials",
    ("matmulOptions", "partialsType"): "engine.partials",
    ("engineOptions", "autoReport.directory"): "engine.profile_dir",
}


def typed_options(given: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Convert the arguments to the Python types that PopTorch looks for.

    Raises ValueError with all unknown names, options that cannot be set, in which graph, and
    arguments of a wrong kind.
    """
    problems = [
        f"{name!r} is not one of {', '.join(SCOPES)}: an option is given under the graphs it is for"
        for name in given
        if name not in SCOPES
    ]
    typed = {}
    for scope in SCOPES:
        options = given.get(scope)
        typed[scope] = _typed(options or {}, "", scope, scope, problems)
        problems += [
            f"{scope}.{place}.{name} is set by {key}"
            for place, name, key in _own_entries(typed[scope])
        ]
    if problems:
        raise ValueError("; ".join(problems))
    return typed


def _own_entries(options: Dict[str, Any]) -> Iterator[Tuple[str, str, str]]:
    """Yield the entries of mappings that a key sets: their place, their name, the key."""
    places = [
        (f"_Popart.set.{name}", name, given)
        for name, given in options.get("_Popart.set", {}).items()
    ]
    places.append(
        ("_Popart.setEngineOptions", "engineOptions", options.get("_Popart.setEngineOptions", {}))
    )
    for place, mapping, given in places:
        for (known, name), key in _OWN_ENTRIES.items():
            if known == mapping and name in given:
                yield place, name, key


def _typed(given: Any, setter: str, scope: str, place: str, problems: List[str]) -> Dict[str, Any]:
    """Convert the mapping of a setter, or of a scope; add what is wrong to `problems`."""
    table = TABLES[setter]
    if not isinstance(given, dict):
        problems.append(f"{place}={given} must be a mapping, {table.what}: value")
        return {}
    typed: Dict[str, Any] = {}
    for name, value in given.items():
        wrong = table.refused.get(name, "") or _graph_problem(name, scope)
        if wrong:
            problems.append(f"{place}.{name} {wrong}")
        elif name not in table.allowed:
            problems.append(
                f"{place}: PopTorch 3.4 knows no {table.what} {name!r}{_hint(name, table)}"
            )
        elif not setter and name in TABLES:
            typed[name] = _typed(value, name, scope, f"{place}.{name}", problems)
        else:
            try:
                typed[name] = _READERS[table.allowed[name]](value)
            except (KeyError, TypeError, ValueError):
                problems.append(f"{place}.{name}={value} must be {table.allowed[name]}")
    return typed


def _hint(name: str, table: Table) -> str:
    """Return where an unknown name belongs, or the one that it resembles."""
    for setter, other in TABLES.items():
        if setter and (name in other.allowed or name in other.refused):
            return f". It belongs into {setter}: {{{name}: ...}}"
    return suggestion(name, [*table.allowed, *table.refused]).replace(" Did", ". Did", 1)


def with_popart_options(given: Any, popart: Any) -> Any:
    """Return `poptorch_options` with the entries of its predecessor `popart_options`, which yield.

    What is not a mapping is returned as it is, for `typed_options` to refuse.
    """
    given = {} if given is None else given
    if not popart or not isinstance(given, dict):
        return given
    if not isinstance(popart, dict):
        return {**given, "both": {"_Popart.set": popart}}
    old: Dict[str, Dict[str, Any]] = {scope: {} for scope in SCOPES}
    for name, value in popart.items():
        scope = next(scope for scope in SCOPES if not _graph_problem(name, scope))
        if name != "numIOTiles":
            old[scope].setdefault("_Popart.set", {})[name] = value
        elif str(value) != "0":  # its default
            old[scope]["TensorLocations.numIOTiles"] = value
    return _merged(old, given)


def _merged(old: Dict[str, Any], new: Dict[str, Any]) -> Dict[str, Any]:
    """Return both mappings in one, level by level; `new` wins."""
    merged = {**old, **new}
    for name in old:
        if isinstance(old[name], dict) and isinstance(new.get(name), dict):
            merged[name] = _merged(old[name], new[name])
        elif new.get(name) is None:  # `both:` without a value
            merged[name] = old[name]
    return merged


def options_of(given: Dict[str, Any], graph: str) -> Dict[str, Any]:
    """Return the options of one graph, ``"training"`` or ``"inference"``."""
    return _merged(given["both"], given[graph])


def is_location(setter: str) -> bool:
    """Return whether a setter takes the settings of a location."""
    return setter in TABLES and TABLES[setter].what == _LOCATION.what
