"""PoplarExecutor: a wrapped model."""

from __future__ import annotations

import datetime
import logging
import time
from typing import Any, Optional

import torch
from torch import Tensor

from . import optim
from .arguments import Arguments, ArgumentsParser
from .compilation import trace_and_compile
from .device_state import DeviceState
from .enums import ConnectionType, OutputMode
from .errors import compiler_error, python_error
from .inspection import log
from .options import Options
from .strategy import ShardedExecution
from .structure import rebuild
from .wrapping import is_wrapped, unwrap, wrap

_logger = logging.getLogger("poptorch::python")


class PoplarExecutor(DeviceState):
    """Result of trainingModel and inferenceModel; called like the model."""

    def __init__(
        self,
        model: torch.nn.Module,
        options: Optional[Options],
        training: bool,
        optimizer: Any = None,
        user_model: Optional[torch.nn.Module] = None,
    ) -> None:
        user_model = user_model if user_model is not None else model
        super().__init__(model, user_model, _own_options(options, training))
        self._training = training
        if training and optimizer is None:
            optimizer = optim.SGD(user_model.parameters(), lr=0.01)
        assert training or not optimizer, "Optimizer should be None for inference"
        self._parse = ArgumentsParser(model)
        self._executable_inputs: Optional[Arguments] = None
        self._outputs_structure: Any = None
        self._is_attached = False
        if optimizer is not None:
            self.setOptimizer(optimizer)
        self._options._freeze()
        if training:
            wrap(self._user_model, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_user_model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._user_model, name)

    def __repr__(self) -> str:
        return repr(self._user_model)

    @property
    def model(self) -> torch.nn.Module:
        return self._user_model

    @property
    def options(self) -> Options:
        return self._options

    def compile(self, *args: Any, **kwargs: Any) -> None:
        inputs = self._parse(args, kwargs)
        if self.isCompiled():
            _logger.warning("Call to compile() ignored: the executable is already compiled")
        else:
            self._compile(inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._options.connection_type != ConnectionType.Never, (
            "Trying to run a model on an offline device (ConnectionType.Never): use"
            " model.compile(inputs) instead of model(inputs)"
        )
        inputs = self._parse(args, kwargs)
        if not self.isCompiled():
            self._compile(inputs)
        executable = self._compiled()
        if not self._is_attached:
            self.attachToDevice()
        if not self._training:
            self._take_weights_of_training()
        assert self._executable_inputs is not None
        self._executable_inputs.check_same(inputs)
        self._write_optimizer_state_if_needed()
        tensors = [tensor.detach() for tensor in inputs.tensors]
        log().record("execute", executable, tensors)
        outputs = executable.run(tensors)
        self._host_rng_state_is_dirty = True
        self._dirty_host_weights = self._training
        if isinstance(self._optimizer, optim.Optimizer):
            self._optimizer.host_state_is_dirty = True
        for output in outputs:
            output.backward = _no_backward  # type: ignore[method-assign, assignment]
        return rebuild(self._outputs_structure, outputs)

    def _compile(self, inputs: Arguments) -> None:
        start = time.perf_counter()
        self._executable_inputs = inputs
        micro_batch = inputs.each(self._narrow).each(_without_grad)
        self._executable, self._outputs_structure = trace_and_compile(self, inputs, micro_batch)
        if self._options.connection_type != ConnectionType.Never:
            log().record("loadEngineAndConnectStreams", self._executable)
            if not self._executable.attached:
                self._executable.attach()
        self._options._progress_bar.compilation_time = datetime.timedelta(
            seconds=time.perf_counter() - start
        )
        self._is_attached = self._executable.attached
        if self._is_attached:
            self._on_device_attach()

    def _narrow(self, tensor: Tensor) -> Tensor:
        """Return the first micro-batch of a host batch."""
        options = self._options
        total = (
            options.device_iterations
            * options.replication_factor
            * options.Training.gradient_accumulation
        )
        size = tensor.shape[0] if tensor.dim() else 1
        assert size % total == 0, (
            f"Invalid batch dimension: In the input {tensor.shape}, the batch dimension ({size})"
            f" must be a multiple of Options.deviceIterations({options.device_iterations}) *"
            f" (Options.replicationFactor({options.replication_factor}) /"
            " Options.inputReplicaGrouping.input_group_size(1)) *"
            f" Options.Training.gradientAccumulation({options.Training.gradient_accumulation}) ="
            f" {total} because it is used to calculate the batch size which will be executed on"
            " the device in any given iteration."
        )
        return tensor.narrow(0, 0, size // total) if tensor.dim() else tensor

    def _take_weights_of_training(self) -> None:
        """Copy newer weights from the executor that trains the same model on other IPUs."""
        refresh = getattr(self._user_model, "copyWeightsToHostIfNeeded", None)
        if callable(refresh):
            refresh()
            version = self._user_model._host_weights_version
            if self._host_weights_version != version:
                self.copyWeightsToDevice()
                self._host_weights_version = version

    def attachToDevice(self) -> None:
        executable = self._compiled()
        assert self._options.connection_type != ConnectionType.Never, (
            "Trying to attach to an offline device (ConnectionType.Never)"
        )
        if self._is_attached:
            raise python_error("Device is already attached")
        log().record("attachToDevice", executable)
        executable.attach()
        log().record("loadEngineAndConnectStreams", executable)
        self._is_attached = True
        self._on_device_attach()

    def detachFromDevice(self) -> None:
        executable = self._compiled()
        if not self._is_attached:
            raise python_error("Device is not attached")
        _ = self.rng_state
        if self._training:
            self.copyWeightsToHostIfNeeded()
            self._read_optimizer_state_if_needed()
        log().record("detachFromDevice", executable)
        executable.detach()
        self._is_attached = False

    def _on_device_attach(self) -> None:
        self.copyWeightsToDevice()
        if self._optimizer:
            self._update_optimizer_if_needed()
        if isinstance(self._optimizer, optim.Optimizer):
            if self._optimizer.has_state():
                self._optimizer.ipu_state_is_dirty = True
                self._write_optimizer_state_if_needed()
            else:
                self._optimizer.host_state_is_dirty = True
                self._optimizer.ipu_state_is_dirty = False
        if self._cached_rng_state is not None:
            self._write_rng_state()

    def destroy(self) -> None:
        if self._executable is None:
            return
        if self._training:
            self.copyWeightsToHostIfNeeded()
            self._optimizer.state_dict()
        self._executable.free()
        self._executable = None
        if self._training:
            if not is_wrapped(self._user_model):
                raise python_error("model was never wrapped")
            unwrap(self._user_model)

    def cycleCount(self) -> int:
        if not self._options._Popart.options["instrumentWithHardwareCycleCounter"]:
            raise python_error(
                "Cycle count logging is disabled. Please set option logCycleCount to True to"
                " enable."
            )
        missing = "Please run the model at least once before obtaining cycle count."
        if self._executable is None:
            raise python_error(missing)
        if not self._executable.runs:
            raise compiler_error(missing)
        return self._executable.cycles

    def compilationTime(self) -> Optional[datetime.timedelta]:
        if not self.isCompiled():
            raise python_error("Please compile the model before obtaining compilation time.")
        if not self._options._show_compilation_progress_bar:
            raise python_error(
                "Please set showCompilationProgressBar option to obtain compilation time."
            )
        return self._options._progress_bar.compilation_time


def _own_options(options: Optional[Options], training: bool) -> Options:
    """Freeze the user's options and return a copy with the default output mode resolved."""
    if options is None:
        own = Options()
    elif isinstance(options, Options):
        options._freeze()
        own = options.clone()
    else:
        raise python_error(
            f"Invalid type: 'options' is of type {type(options)} (Expected poptorch.Options)"
        )
    if own.defaultOutputMode():
        own.outputMode(OutputMode.Final if training else OutputMode.All)
    if not training and own.Training.gradient_accumulation != 1:
        message = (
            "You must set poptorch.Options().Training.gradientAccumulation to 1 or leave it as its"
            " default value (1) when running a poptorch.inferenceModel()."
        )
        if not isinstance(own._execution_strategy, ShardedExecution):
            message += (
                " Use poptorch.Options().deviceIterations to process a sufficient number of"
                " batches each run for pipelined execution instead."
            )
        raise python_error(message)
    return own


def _without_grad(tensor: Tensor) -> Tensor:
    if tensor.requires_grad:
        _logger.warning(
            "Input tensor has requires_grad=True set. This tensor will be detached because"
            " backward pass via inputs is not supported."
        )
    return tensor.detach()


def _no_backward() -> None:
    raise python_error(
        "backward() cannot be called explicitly on outputs of a PopTorch model. If you're using a"
        " trainingModel, the backwards pass is performed automatically when invoking the model. If"
        " you're using an inferenceModel, you should use a trainingModel instead."
    )
