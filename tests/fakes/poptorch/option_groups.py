"""The groups of options: Training, Precision, TensorLocations, Distributed and _Popart."""

from __future__ import annotations

import copy
import os
from typing import Any, Dict, Optional

import torch

from .enums import MeanReductionStrategy, ReductionType
from .option_values import OptionValues


class PopartOptions:
    """Options of the compiler by their own names; names and types are checked at compilation."""

    def __init__(self) -> None:
        self._is_frozen = False
        self.options: Dict[str, Any] = {}
        self.set("instrumentWithHardwareCycleCounter", False)
        self.set("rearrangeAnchorsOnHost", False)

    def __deepcopy__(self, memory: Dict[int, Any]) -> PopartOptions:
        other = PopartOptions()
        memory[id(self)] = other
        other.options = copy.deepcopy(self.options, memory)
        return other

    def checkIsFrozen(self, option: Any = None) -> None:
        if option != "_is_frozen" and self._is_frozen:
            raise AttributeError("Can't modify frozen Options")

    def set(self, key: str, value: Any) -> PopartOptions:
        self.checkIsFrozen()
        self.options[key] = value
        return self

    def setEngineOptions(self, engine_options: Dict[str, str]) -> PopartOptions:
        self.set("engineOptions", engine_options)
        return self

    def setPatterns(self, patterns: Dict[str, bool], level: int = 2) -> PopartOptions:
        assert isinstance(level, int)
        assert isinstance(patterns, dict)
        self.set("patterns_level", level)
        self.set("patterns", patterns)
        return self

    def __repr__(self) -> str:
        return f"PopartOptions({self.options})"


class PrecisionOptions(OptionValues):
    def __init__(self, popart_options: PopartOptions) -> None:
        self._popart_options = popart_options
        super().__init__()

    def enableFloatingPointExceptions(self, enabled: bool) -> PrecisionOptions:
        assert isinstance(enabled, bool), "enableFloatingPointExceptions needs to be set to a bool"
        self._popart_options.set("enableFloatingPointChecks", enabled)
        return self

    def enableStochasticRounding(self, enabled: bool) -> PrecisionOptions:
        self._popart_options.set("enableStochasticRounding", enabled)
        return self

    def setPartialsType(self, dtype: torch.dtype) -> PrecisionOptions:
        names = {torch.float32: "float", torch.float16: "half"}
        if dtype not in names:
            raise ValueError(
                "parameter to setPartialsType should be eithertorch.float or torch.half"
            )
        self._popart_options.set("partialsTypeMatMuls", names[dtype])
        # Replaces what another option wrote there.
        self._popart_options.set("convolutionOptions", {"partialsType": names[dtype]})
        return self


class TrainingOptions(OptionValues):
    def __init__(self, popart_options: PopartOptions) -> None:
        self._popart_options = popart_options
        super().__init__(
            gradient_accumulation=1,
            accumulation_and_replication_reduction_type=ReductionType.Mean,
            meanAccumulationAndReplicationReductionStrategy=MeanReductionStrategy.Post,
        )

    def gradientAccumulation(self, gradient_accumulation: int) -> TrainingOptions:
        self.set(gradient_accumulation=gradient_accumulation)
        return self

    def accumulationAndReplicationReductionType(
        self, reduction_type: ReductionType
    ) -> TrainingOptions:
        known = isinstance(reduction_type, ReductionType)
        if not known or reduction_type == ReductionType.NoReduction:
            raise ValueError(
                "accumulationAndReplicationReductionType must be set to "
                "poptorch.ReductionType.Mean or poptorch.ReductionType.Sum"
            )
        self.set(accumulation_and_replication_reduction_type=reduction_type)
        return self

    def setMeanAccumulationAndReplicationReductionStrategy(
        self, mean_reduction_strategy: MeanReductionStrategy
    ) -> TrainingOptions:
        self.set(meanAccumulationAndReplicationReductionStrategy=mean_reduction_strategy)
        return self

    def setAutomaticLossScaling(self, enabled: bool) -> TrainingOptions:
        self._popart_options.set("automaticLossScalingSettings.enabled", enabled)
        return self

    def setConvolutionDithering(self, enabled: bool) -> TrainingOptions:
        self._popart_options.set("convolutionOptions", {"enableConvDithering": enabled})
        return self


class DistributedOptions(OptionValues):
    def __init__(self) -> None:
        super().__init__(num_distributed_processes=1, distributed_process_id=0, ipuof_configs={})
        self.setEnvVarNames("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")

    def disable(self) -> DistributedOptions:
        self.set(num_distributed_processes=1, distributed_process_id=0)
        return self

    def setEnvVarNames(self, var_num_processes: str, var_process_id: str) -> DistributedOptions:
        return self.configureProcessId(
            int(os.environ.get(var_process_id, "0")), int(os.environ.get(var_num_processes, "1"))
        )

    def configureProcessId(self, process_id: int, num_processes: int) -> DistributedOptions:
        self.set(distributed_process_id=process_id)
        self.set(num_distributed_processes=num_processes)
        return self

    @property
    def processId(self) -> int:
        return self.distributed_process_id

    @property
    def numProcesses(self) -> int:
        return self.num_distributed_processes


class TensorLocationSettings(OptionValues):
    """Where a kind of tensor is stored."""

    def minElementsForOffChip(self, min_elements: int) -> TensorLocationSettings:
        assert isinstance(min_elements, int)
        self.createOrSet(minElementsForOffChip=min_elements)
        return self

    def minElementsForReplicatedTensorSharding(self, min_elements: int) -> TensorLocationSettings:
        assert isinstance(min_elements, int)
        self.createOrSet(minElementsForReplicatedTensorSharding=min_elements)
        return self

    def useOnChipStorage(self, use: Optional[bool] = True) -> TensorLocationSettings:
        if use is None:
            self.deleteIfExists("onChip")
        else:
            self._flag("onChip", use)
        return self

    def useReplicatedTensorSharding(self, use: bool = True) -> TensorLocationSettings:
        return self._flag("useReplicatedTensorSharding", use)

    def useIOTilesToLoad(self, use: bool = True) -> TensorLocationSettings:
        return self._flag("useIOTilesToLoad", use)

    def useIOTilesToStore(self, use: bool = True) -> TensorLocationSettings:
        return self._flag("useIOTilesToStore", use)

    def _flag(self, name: str, use: bool) -> TensorLocationSettings:
        assert isinstance(use, bool)
        self.createOrSet(**{name: int(use)})
        return self


class TensorLocationOptions(OptionValues):
    def numIOTiles(self, num_tiles: int) -> TensorLocationOptions:
        assert isinstance(num_tiles, int)
        assert 32 <= num_tiles <= 192 and num_tiles % 2 == 0, (
            "numIOTiles must be an even number between 32 and 192."
        )
        self.createOrSet(numIOTiles=num_tiles)
        return self

    def setActivationLocation(self, location: TensorLocationSettings) -> TensorLocationOptions:
        return self._location("location_activation", location)

    def setWeightLocation(self, location: TensorLocationSettings) -> TensorLocationOptions:
        return self._location("location_weight", location)

    def setOptimizerLocation(self, location: TensorLocationSettings) -> TensorLocationOptions:
        return self._location("location_optimizer", location)

    def setAccumulatorLocation(self, location: TensorLocationSettings) -> TensorLocationOptions:
        return self._location("location_accumulator", location)

    def _location(self, name: str, location: TensorLocationSettings) -> TensorLocationOptions:
        assert isinstance(location, TensorLocationSettings)
        # A copy: later changes of the settings have no effect.
        self.createOrSet(**{name: location.toDict()})
        return self
