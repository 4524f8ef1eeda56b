"""Weights, optimizer state and random state, and their copies between host and device."""

from __future__ import annotations

from types import MethodType
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from . import optim
from .errors import python_error
from .executable import Executable
from .inspection import log
from .optimizer_dictionary import optimizer_dictionary
from .options import Options

_NOT_COMPILED = "Model has not been compiled or has been destroyed."


class DeviceState:
    """The part of an executor that synchronises host and device; every copy is logged."""

    def __init__(
        self, model: torch.nn.Module, user_model: torch.nn.Module, options: Options
    ) -> None:
        self._model, self._user_model = model, user_model
        self._options = options
        self._executable: Optional[Executable] = None
        self._host_weights_version = 0
        self._dirty_host_weights = False
        self._optimizer: Any = None
        self._dict_optimizer: Dict[str, Any] = {}
        self._ipu_optimizer_is_dirty = False
        self._host_rng_state_is_dirty = False
        self._cached_rng_state: Optional[List[int]] = None
        if options.exists("random_seed"):
            self._cached_rng_state = [options.random_seed]

    def isCompiled(self) -> bool:
        return self._executable is not None

    def isAttachedToDevice(self) -> bool:
        return self._executable is not None and self._executable.attached

    def _compiled(self) -> Executable:
        if self._executable is None:
            raise python_error(_NOT_COMPILED)
        return self._executable

    def copyWeightsToHostIfNeeded(self) -> bool:
        if self._dirty_host_weights:
            self.copyWeightsToHost()
            return True
        return False

    def copyWeightsToHost(self) -> None:
        executable = self._compiled()
        # First, because reading the parameters below must not call this function again.
        self._dirty_host_weights = False
        names, tensors = self._host_weights()
        log().record("copyWeightsToHost_impl", executable, len(names))
        executable.read_weights(names, tensors)
        self._host_weights_version += 1

    def copyWeightsToDevice(self) -> None:
        executable = self._compiled()
        self._dirty_host_weights = False
        if self._optimizer:
            # Reads the state of the optimizer first, which the device would lose.
            self._optimizer.state_dict()
        names, tensors = self._host_weights()
        log().record("copyWeightsToDevice_impl", executable, len(names))
        executable.write_weights(names, tensors)

    def _host_weights(self) -> Tuple[List[str], List[Tensor]]:
        weights = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        return list(weights), list(weights.values())

    def load_state_dict(self, state_dict: Dict[str, Tensor], strict: bool = True) -> Any:
        result = self._user_model.load_state_dict(state_dict, strict)
        if self.isAttachedToDevice():
            self.copyWeightsToDevice()
        return result

    def setOptimizer(self, optimizer: Any) -> None:
        ours = isinstance(optimizer, optim.Optimizer)
        if self.isCompiled() and optimizer is not self._optimizer:
            if isinstance(self._optimizer, optim.Optimizer):
                # The old optimizer keeps its state and no longer reads it from the device.
                self._read_optimizer_state_if_needed()
                self._optimizer.state_dict = self._optimizer.get_state_dict
            if ours:
                optimizer.ipu_state_is_dirty = True
        if ours:
            optimizer.state_dict = MethodType(DeviceState._optimizer_state_dict, self)
        self._optimizer = optimizer
        dictionary = optimizer_dictionary(optimizer, self._options, self.isCompiled())
        if dictionary != self._dict_optimizer:
            self._dict_optimizer = dictionary
            self._ipu_optimizer_is_dirty = True
        if self.isAttachedToDevice():
            self._update_optimizer_if_needed()
            self._write_optimizer_state_if_needed()

    def _update_optimizer_if_needed(self) -> None:
        executable = self._compiled()
        if self._ipu_optimizer_is_dirty:
            log().record("updateOptimizers", executable, self._dict_optimizer)
            executable.optimizer.update(self._dict_optimizer)
            self._ipu_optimizer_is_dirty = False

    def _optimizer_state_dict(self) -> Dict[str, Any]:
        self._read_optimizer_state_if_needed()
        state: Dict[str, Any] = self._optimizer.get_state_dict()
        return state

    def _read_optimizer_state_if_needed(self) -> None:
        if not isinstance(self._optimizer, optim.Optimizer):
            return
        if not self._optimizer.host_state_is_dirty:
            return
        executable = self._compiled()
        assert not self._ipu_optimizer_is_dirty, (
            "Both host and ipu states cannot be dirty at the same time."
        )
        log().record("readOptimizerState", executable)
        state = {
            **executable.optimizer.read(),
            **torch.optim.Optimizer.state_dict(self._optimizer),  # type: ignore[arg-type]
        }
        self._optimizer.set_state_dict(state)
        self._optimizer.ipu_state_is_dirty = False

    def _write_optimizer_state_if_needed(self) -> None:
        executable = self._compiled()
        optimizer = self._optimizer
        if not isinstance(optimizer, optim.Optimizer) or not optimizer.ipu_state_is_dirty:
            return
        assert not optimizer.host_state_is_dirty, (
            "Both host and ipu states cannot be dirty at the same time."
        )
        if optimizer.has_state():
            self.copyWeightsToHostIfNeeded()
            state = optimizer.state_dict()
            log().record("writeOptimizerState", executable)
            executable.optimizer.write(state)
        optimizer.ipu_state_is_dirty = False

    @property
    def rng_state(self) -> Optional[List[int]]:
        executable = self._compiled()
        if self._host_rng_state_is_dirty:
            self._host_rng_state_is_dirty = False
            self._cached_rng_state = [executable.seed, *executable.rng.tolist()]
        return self._cached_rng_state

    @rng_state.setter
    def rng_state(self, state: List[int]) -> None:
        self._compiled()
        self._host_rng_state_is_dirty = False
        self._cached_rng_state = state.copy()
        if self.isAttachedToDevice():
            self._write_rng_state()

    def _write_rng_state(self) -> None:
        assert self._cached_rng_state is not None
        seed, *state = self._cached_rng_state
        log().record("setRngState", self._executable, seed)
        self._compiled().set_rng(seed, state)
