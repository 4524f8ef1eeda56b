"""Record the public surface of PopTorch from its sources.

    POPTORCH_SRC=<checkout of graphcore/poptorch> POPTORCH_FRONTEND=<folder of the harness> \
        python tests/fakes/conformance/record_api.py

This writes `api.json`, which the tests compare with the stand-in, and
`poptorch/session_options.json`, the options that the compiler knows, which the stand-in reads.
`--print` prints the former instead.
"""

from __future__ import annotations

import enum
import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Set

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fakes import loading

API_FILE = loading.FAKES / "conformance" / "api.json"
OPTIONS_FILE = loading.FAKES / "poptorch" / "session_options.json"

_ENUMS = [
    "AutoStage",
    "CommGroupType",
    "ConnectionType",
    "DataLoaderMode",
    "MeanReductionStrategy",
    "OutputMode",
    "ReductionType",
    "SharingStrategy",
    "SyncPattern",
]

_FUNCTIONS = [
    "BeginBlock",
    "identity_loss",
    "inferenceModel",
    "ipuHardwareIsAvailable",
    "ipuHardwareVersion",
    "isRunningOnIpu",
    "recomputationCheckpoint",
    "removeBlocks",
    "setLogLevel",
    "trainingModel",
]

_ERRORS = ["Error", "RecoverableError", "UnrecoverableError"]

# Path in poptorch of a class, or with "()" of an instance -> methods and properties.
_CLASSES = {
    "AsynchronousDataAccessor": "__init__ __iter__ __len__ __next__ terminate",
    "Block": "__init__ start useAutoId",
    "DataLoader": "__init__ __iter__ __len__ combinedBatchSize options terminate",
    "Options": """
        Distributed Precision TensorLocations Training _Popart __init__ autoRoundNumIPUs
        broadcastBuffers checkIsFrozen clone connectionType createOrSet defaultOutputMode
        deleteIfExists deviceIterations disableModuleNamescope enableExecutableCaching
        enableProfiling enableStableNorm enableSyntheticData exists logCycleCount logDir modelName
        outputMode randomSeed relaxOptimizerAttributesChecks replicationFactor
        setAvailableMemoryProportion setExecutionStrategy showCompilationProgressBar syncPattern
        toDict updatableNamedBuffers useIpuId useIpuModel useOfflineIpuTarget""",
    "Options().Distributed": "configureProcessId disable numProcesses processId setEnvVarNames",
    "Options().Precision": """
        enableFloatingPointExceptions enableStochasticRounding setPartialsType""",
    "Options().TensorLocations": """
        numIOTiles setAccumulatorLocation setActivationLocation setOptimizerLocation
        setWeightLocation""",
    "Options().Training": """
        accumulationAndReplicationReductionType gradientAccumulation setAutomaticLossScaling
        setConvolutionDithering setMeanAccumulationAndReplicationReductionStrategy""",
    "Options()._Popart": "checkIsFrozen set setEngineOptions setPatterns",
    "PipelinedExecution": "__init__ backendOptions onEndTracing onStartTracing stage",
    "PoplarExecutor": """
        __call__ attachToDevice compilationTime compile copyWeightsToDevice copyWeightsToHost
        copyWeightsToHostIfNeeded cycleCount destroy detachFromDevice isAttachedToDevice
        isCompiled load_state_dict model options rng_state setOptimizer""",
    "ShardedExecution": "__init__ backendOptions stage",
    "Stage": "__init__ blocks ipu",
    "TensorLocationSettings": """
        minElementsForOffChip minElementsForReplicatedTensorSharding useIOTilesToLoad
        useIOTilesToStore useOnChipStorage useReplicatedTensorSharding""",
    "optim.AdamW": "__init__",
    "optim.LAMB": "__init__",
    "optim.Optimizer": """
        __init__ get_state_dict has_state load_state_dict set_state_dict state_dict""",
    "optim.SGD": "__init__",
    "optim.VariableAttributes": "__init__ isConstant markAsConstant markAsVariable",
}

# What a user sets by a call: group of names -> path in poptorch of the object with the setters.
_SETTERS = {
    "": "Options()",
    "Distributed.": "Options().Distributed",
    "Jit.": "Options().Jit",
    "Precision.": "Options().Precision",
    "TensorLocationSettings.": "TensorLocationSettings",
    "TensorLocations.": "Options().TensorLocations",
    "Training.": "Options().Training",
    "VariableAttributes.": "optim.VariableAttributes",
    "_Popart.": "Options()._Popart",
}
# Public methods of these objects that set nothing.
_READERS = {"checkIsFrozen", "clone", "defaultOutputMode", "isConstant", "toDict"}


def setters(poptorch: Any) -> Dict[str, str]:
    """Return the parameters of every setter of PopTorch's options, by its dotted name."""
    return {
        f"{group}{name}": _signature(member)
        for group, path in _SETTERS.items()
        for name, member in vars(_class_of(poptorch, path)).items()
        if inspect.isfunction(member) and not name.startswith("_") and name not in _READERS
    }


def describe(poptorch: Any) -> Dict[str, Any]:
    """Return the surface of a poptorch module in the form of api.json."""
    return {
        "classes": {name: _class(poptorch, name, _CLASSES[name].split()) for name in _CLASSES},
        "enums": {name: _members(getattr(poptorch, name)) for name in _ENUMS},
        "errors": {
            name: [base.__name__ for base in getattr(poptorch, name).__bases__] for name in _ERRORS
        },
        "functions": {name: _signature(getattr(poptorch, name)) for name in _FUNCTIONS},
        "version": poptorch.__version__.split("+")[0],
    }


def _class(poptorch: Any, path: str, names: List[str]) -> Dict[str, str]:
    cls = _class_of(poptorch, path)
    members = {name: inspect.getattr_static(cls, name) for name in names}
    return {
        name: _property(member) if isinstance(member, property) else _signature(member)
        for name, member in members.items()
    }


def _class_of(poptorch: Any, path: str) -> Any:
    value = poptorch
    for part in path.split("."):
        value = getattr(value, part[:-2])() if part.endswith("()") else getattr(value, part)
    return value if inspect.isclass(value) else type(value)


def _property(member: property) -> str:
    return "property" if member.fset is None else "property, settable"


def _signature(function: Any) -> str:
    """Return names, kinds and defaults of the parameters, without annotations."""
    prefix = "static " if isinstance(function, staticmethod) else ""
    function = getattr(function, "__func__", function)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    return prefix + str(inspect.Signature(parameters))


def _members(cls: Any) -> Dict[str, Any]:
    assert issubclass(cls, enum.Enum)
    return {member.name: member.value for member in cls}


def session_options(source: Path) -> Dict[str, List[str]]:
    """Return every option that the compiler registers: name -> kinds of values."""
    text = (source / "popart_compiler" / "source" / "SessionOptions.cpp").read_text("utf-8")
    found = re.findall(r'registerSetter\(\s*(\w+)_options,\s*"([^"]+)"', text)
    found += [("string", name) for name in re.findall(r'string_options\["(\w+)"\]', text)]
    found += [
        ("uint64" if kind == "ENUM" else kind.lower(), name)
        for kind, name in re.findall(r"ADD_POPART_([A-Z0-9]+)_OPTION\(\s*([\w.]+)\s*[,)]", text)
        if name != "name"  # the definition of the macro
    ]
    kinds: Dict[str, Set[str]] = {}
    for kind, name in found:
        kinds.setdefault(name, set()).add(kind)
    return {name: sorted(kinds[name]) for name in sorted(kinds)}


def as_text(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def main() -> None:
    reason = loading.available()
    if reason is not None:
        raise SystemExit(f"record_api.py: {reason}")
    with loading.frontend() as (poptorch, _):
        api = as_text({**describe(poptorch), "setters": setters(poptorch)})
    if "--print" in sys.argv:
        sys.stdout.write(api)
        return
    API_FILE.write_text(api, encoding="utf-8")
    kinds = session_options(Path(os.environ["POPTORCH_SRC"]))
    # One option per line.
    lines = [f"{json.dumps(name)}: {json.dumps(kinds[name])}" for name in kinds]
    OPTIONS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
