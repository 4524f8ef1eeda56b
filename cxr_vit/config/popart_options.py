"""Names and value types of PopART's session options, for `engine.popart_options`.

PopTorch checks names and Python types only at the end of a compilation: `1` for `True`, or a
misspelt name, fails half an hour later. The names are those that PopTorch 3.4 registers
(popart_compiler/source/SessionOptions.cpp).
"""

from typing import Any, Dict

from cxr_vit.errors import suggestion

#: Option -> type of its value. Enumerations are integers.
KINDS: Dict[str, str] = {
    name: kind
    for kind, names in {
        "true or false": """
            aliasZeroCopy automaticLossScalingSettings.enabled
            batchSerializationSettings.concatOnExecutionPhaseChange
            batchSerializationSettings.concatOnPipelineStageChange
            batchSerializationSettings.concatOnVirtualGraphChange compileEngine constantWeights
            decomposeGradSum delayVarUpdates disableGradAccumulationTensorStreams
            disableOptimizerStateTensorStreams dotOpNames enableDistributedReplicatedGraphs
            enableExplicitIR enableExplicitMainLoops enableFullyConnectedPass
            enableGradientAccumulation enableInplaceAmbiguityChecking enableLoadAndOffloadRNGState
            enableMergeExchange enableNonStableSoftmax enableOutlining
            enableOutliningCopyCostPruning enablePipelining enablePrefetchDatastreams
            enableReplicatedGraphs enableSerializedMatmuls enableStableNorm
            enableSupportedDataTypeCasting ensureFp32LossScaleTensor explicitRecomputation
            exportPoplarComputationGraph exportPoplarVertexGraph groupHostSync
            groupNormStridedChannelGrouping opxAliasChecking opxModifyChecking
            rearrangeAnchorsOnHost rearrangeStreamsOnHost
            replicatedCollectivesSettings.mergeAllReduceCollectives
            replicatedCollectivesSettings.prepareScheduleForMergingCollectives
            scheduleNonWeightUpdateGradientConsumersEarly separateCallOpPdfs strictOpVersions
            useHostCopyOps
        """,
        "an integer >= 0": """
            accumulateOuterFragmentSettings.schedule autodiffSettings.stitchStrategy
            automaticLossScalingSettings.gradientTensorTrackingMethod
            automaticLossScalingSettings.updatePeriod autoRecomputation
            batchSerializationSettings.batchSchedule batchSerializationSettings.factor
            batchSerializationSettings.method batchSerializationSettings.transformContext
            compilationProgressTotal defaultBufferingDepth executionPhaseSettings.phases
            executionPhaseSettings.stages finalDotOp firstDotOp globalReplicaOffset
            globalReplicationFactor looseThresholdAtPeak mergeVarUpdate mergeVarUpdateMemThreshold
            numIOTiles subgraphCopyingStrategy swapLimitScheduler
            transitiveClosureOptimizationThreshold virtualGraphMode
        """,
        "a number": """
            automaticLossScalingSettings.binEdgeLocation
            automaticLossScalingSettings.thresholdUpperCountProportion outlineSequenceBreakCost
            outlineThreshold timeLimitScheduler
        """,
        "text": """
            customCodeletCompileFlags kahnTieBreaker saveInitializersToFile
            serializedPoprithmsShiftGraphsDir
        """,
        "a list": """
            accumulateOuterFragmentSettings.excludedVirtualGraphs customCodelets dotChecks
            hardwareInstrumentations updatableNamedBuffers
        """,
        "a mapping": """
            convolutionOptions engineOptions gclOptions lstmOptions matmulOptions reportOptions
        """,
    }.items()
    for name in names.split()
}

#: PopART options -> the configuration key that sets them.
OWN_KEYS: Dict[str, str] = {
    "accumulationAndReplicationReductionType": "nothing: the schedule assumes the mean",
    "accumulationFactor": "batch.gradient_accumulation",
    "cachePath": "engine.executable_cache",
    "defaultPrefetchBufferingDepth": "engine.prefetch_depth",
    "enableEngineCaching": "engine.executable_cache",
    "enableFloatingPointChecks": "engine.floating_point_exceptions",
    "enableStochasticRounding": "engine.stochastic_rounding",
    "instrumentWithHardwareCycleCounter": "engine.log_cycles",
    "logDir": "nothing: PopTorch ignores it",
    "meanAccumulationAndReplicationReductionStrategy": "optim.accumulator",
    "partialsTypeMatMuls": "engine.partials",
    "syntheticDataMode": "engine.synthetic_data",
}


def typed_options(options: Dict[str, Any]) -> Dict[str, Any]:
    """Convert the values to the Python types that PopTorch looks for.

    Raises ValueError with all unknown names, options that another key sets, and values of a wrong
    type.
    """
    typed: Dict[str, Any] = {}
    problems = []
    for name, value in options.items():
        if name in OWN_KEYS:
            problems.append(f"{name} is set by {OWN_KEYS[name]}")
        elif name not in KINDS:
            hint = suggestion(name, KINDS)
            problems.append(f"PopTorch 3.4 knows no PopART option {name!r}.{hint}")
        else:
            try:
                typed[name] = _read(KINDS[name], value)
            except (KeyError, TypeError, ValueError):
                problems.append(f"{name}={value} must be {KINDS[name]}")
    if problems:
        raise ValueError("; ".join(problems))
    return typed


def _read(kind: str, value: Any) -> Any:
    """Convert a value; raise KeyError, TypeError or ValueError if it is of another kind."""
    if kind == "a list" and isinstance(value, list):
        return [_read("text", item) for item in value]
    if kind == "a mapping" and isinstance(value, dict):
        return {str(key): _read("text", item) for key, item in value.items()}
    if kind in ("a list", "a mapping") or isinstance(value, (list, dict)):
        raise TypeError(value)
    text = str(value)
    if kind == "true or false":
        return {"true": True, "false": False}[text.lower()]
    if kind == "an integer >= 0":
        if int(text) < 0:
            raise ValueError(text)
        return int(text)
    return float(text) if kind == "a number" else text
