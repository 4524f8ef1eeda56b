"""Options: how a model is compiled and run."""

from __future__ import annotations

import copy
import datetime
import logging
import os
from typing import Any, Dict, List, Optional

import torch

from .enums import CommGroupType, ConnectionType, OutputMode, SyncPattern
from .option_groups import (
    DistributedOptions,
    PopartOptions,
    PrecisionOptions,
    TensorLocationOptions,
    TensorLocationSettings,
    TrainingOptions,
)
from .option_values import OptionValues
from .strategy import PipelinedExecution

__all__ = ["Options", "TensorLocationSettings"]

_logger = logging.getLogger("poptorch::python")


class ProgressBar:
    """Progress callback of the compiler; shows nothing and measures the time."""

    def __init__(self) -> None:
        self.compilation_time: Optional[datetime.timedelta] = None

    def __call__(self, progress: int, total: int) -> None:
        pass


class JitOptions(OptionValues):
    """Nothing is left of PopTorch's options of the JIT compiler."""


class Options(OptionValues):
    """All options. Setters return the options themselves."""

    def __init__(self) -> None:
        self._popart = PopartOptions()
        self._precision = PrecisionOptions(self._popart)
        self._training = TrainingOptions(self._popart)
        self._distributed = DistributedOptions()
        self._tensor_locations = TensorLocationOptions()
        self._execution_strategy = PipelinedExecution()
        self._progress_bar = ProgressBar()
        self._source_location_excludes = [
            "install/poptorch",
            "site-packages/torch",
            "site-packages/poptorch",
        ]
        self._relax_optimizer_checks = False
        self._show_compilation_progress_bar = True
        self._module_namescope_enabled = True
        super().__init__(
            replication_factor=1,
            input_group_size=1,
            input_cgt=CommGroupType.Consecutive,
            broadcast_buffers=True,
            device_iterations=1,
            log_dir=".",
            max_repeat_logs=4,
            auto_round_num_ipus=False,
            anchored_tensors={},
            output_mode=OutputMode.Default.value,
            output_return_period=1,
            connection_type=ConnectionType.Always.value,
            sync_pattern=SyncPattern.Full.value,
            available_memory_proportion={},
        )
        if os.environ.get("POPTORCH_CACHE_DIR"):
            self.enableExecutableCaching(os.environ["POPTORCH_CACHE_DIR"])

    @property
    def Jit(self) -> JitOptions:
        return JitOptions()

    @property
    def TensorLocations(self) -> TensorLocationOptions:
        return self._tensor_locations

    @property
    def Distributed(self) -> DistributedOptions:
        return self._distributed

    @property
    def Precision(self) -> PrecisionOptions:
        return self._precision

    @property
    def Training(self) -> TrainingOptions:
        return self._training

    @property
    def _Popart(self) -> PopartOptions:
        return self._popart

    def sourceLocationExcludes(self, excludes: List[str]) -> Options:
        self._source_location_excludes = excludes
        return self

    def appendToLocationExcludes(self, *excludes: str) -> Options:
        self._source_location_excludes += excludes
        return self

    def showCompilationProgressBar(self, show: bool = True) -> Options:
        self._show_compilation_progress_bar = show
        return self

    def relaxOptimizerAttributesChecks(self, relax: bool = True) -> Options:
        self._relax_optimizer_checks = relax
        return self

    def disableModuleNamescope(self) -> Options:
        self._module_namescope_enabled = False
        return self

    def autoRoundNumIPUs(self, auto_round_num_ipus: bool = True) -> Options:
        self.set(auto_round_num_ipus=auto_round_num_ipus)
        return self

    def deviceIterations(self, device_iterations: int) -> Options:
        self.set(device_iterations=device_iterations)
        return self

    def setExecutionStrategy(self, strategy: PipelinedExecution) -> Options:
        assert isinstance(strategy, PipelinedExecution)
        self._execution_strategy = strategy
        return self

    def setAvailableMemoryProportion(
        self, available_memory_proportion: Dict[str, float]
    ) -> Options:
        proportions = {}
        for key, memory in available_memory_proportion.items():
            assert key.startswith("IPU"), (
                "Available memory proportions are expected to be in a dictionary of "
                f'{{"IPU0": 0.5}} where the 0 in IPU is the index of the IPU. Invalid key: {key}'
            )
            proportions[int(key[3:])] = memory
        self.createOrSet(available_memory_proportion=proportions)
        return self

    def replicationFactor(self, replication_factor: int) -> Options:
        self.set(replication_factor=replication_factor)
        return self

    def broadcastBuffers(self, broadcast_buffers: bool = True) -> Options:
        self.set(broadcast_buffers=broadcast_buffers)
        return self

    def logDir(self, log_dir: str) -> Options:
        self.set(log_dir=log_dir)
        return self

    def maxRepeatLogs(self, max_lines: Optional[int]) -> Options:
        self.set(max_repeat_logs=(1 << 64) - 1 if max_lines is None else max_lines)
        return self

    def modelName(self, name: str) -> Options:
        self.createOrSet(model_name=name)
        return self

    def enableExecutableCaching(self, path: Optional[str]) -> Options:
        if path is None:
            self._popart.set("enableEngineCaching", False)
        else:
            self._popart.set("cachePath", path)
            self._popart.set("enableEngineCaching", True)
        return self

    def useIpuModel(self, use_model: bool) -> Options:
        self.createOrSet(use_model=use_model)
        return self

    def useIpuId(self, ipu_id: int) -> Options:
        assert isinstance(ipu_id, int)
        self.createOrSet(ipu_id=ipu_id)
        return self

    def connectionType(self, connection_type: ConnectionType) -> Options:
        assert isinstance(connection_type, ConnectionType)
        self.set(connection_type=connection_type.value)
        return self

    def syncPattern(self, sync_pattern: SyncPattern) -> Options:
        assert isinstance(sync_pattern, SyncPattern)
        self.set(sync_pattern=sync_pattern.value)
        return self

    def useOfflineIpuTarget(self, ipu_version: int = 2) -> Options:
        self.connectionType(ConnectionType.Never)
        self.createOrSet(ipu_version=ipu_version)
        return self

    def outputMode(
        self, output_mode: OutputMode, output_return_period: Optional[int] = None
    ) -> Options:
        assert isinstance(output_mode, OutputMode)
        if output_mode == OutputMode.EveryN:
            assert output_return_period and output_return_period > 0, (
                "EveryN anchor must have output_return_period set to valid positive integer"
            )
        self.set(output_mode=output_mode.value, output_return_period=output_return_period or 1)
        return self

    def defaultOutputMode(self) -> bool:
        return self.output_mode == OutputMode.Default

    def randomSeed(self, random_seed: int) -> Options:
        assert isinstance(random_seed, int)
        # Seeds the host's generator too, as PopTorch does.
        torch.manual_seed(random_seed)
        self.createOrSet(random_seed=random_seed)
        return self

    def enableStableNorm(self, enabled: bool) -> Options:
        self._popart.set("enableStableNorm", enabled)
        return self

    def enableSyntheticData(self, enabled: bool) -> Options:
        self._popart.set("syntheticDataMode", 2 if enabled else 0)
        return self

    def logCycleCount(self, log_cycle_count: bool) -> Options:
        self._popart.set("instrumentWithHardwareCycleCounter", log_cycle_count)
        return self

    def enableProfiling(self, profile_dir: Optional[str] = None) -> Options:
        settings = os.environ.get("POPLAR_ENGINE_OPTIONS", "")
        names = ("debug.allowOutOfMemory", "autoReport.directory", "autoReport.all")
        if any(name in settings for name in names):
            _logger.warning("Profiling setting overridden by environment variable.")
        engine_options = self._popart.options.get("engineOptions", {})
        engine_options["debug.allowOutOfMemory"] = "true"
        engine_options["autoReport.directory"] = profile_dir or "."
        engine_options["autoReport.all"] = "true"
        self._popart.setEngineOptions(engine_options)
        return self

    def updatableNamedBuffers(self, buffers: List[str]) -> Options:
        self._popart.set("updatableNamedBuffers", buffers)
        return self

    def toDict(self) -> Dict[str, Any]:
        """Return everything the compiler receives, in one dictionary."""
        assert not self.defaultOutputMode(), "An output mode must be picked before serialisation"
        merged = self._execution_strategy.backendOptions()
        merged.update(self._popart.options)
        for group in (super(), self._training, self._distributed, self._tensor_locations):
            merged = group.update(merged)
        if self._show_compilation_progress_bar:
            merged["compilation_progress_bar_fn"] = self._progress_bar
        return merged

    def clone(self) -> Options:
        """Return a deep copy that is not frozen."""
        return copy.deepcopy(self)
