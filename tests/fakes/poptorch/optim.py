"""The optimizers on the host: hyperparameters, and between uses the state of the device.

They are never stepped in training: the device updates from the dictionary that
`optimizer_dictionary` makes of them.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Optional, Tuple

import torch

__all__ = ["LAMB", "SGD", "AdamW", "Optimizer", "VariableAttributes"]

_ACCUMULATION_TYPES = (torch.float16, torch.float32)


class VariableAttributes:
    """Records which attributes can change after compilation: those passed to the constructor."""

    def __init__(self, variable_attributes: List[str], allowed_attributes: List[str]) -> None:
        self._variable_attributes = variable_attributes
        self._allowed_attributes = allowed_attributes

    def isConstant(self, attr: str) -> bool:
        return attr not in self._variable_attributes

    def markAsConstant(self, attr: str) -> None:
        self._check(attr)
        self._variable_attributes = [name for name in self._variable_attributes if name != attr]

    def markAsVariable(self, attr: str) -> None:
        self._check(attr)
        self._variable_attributes.append(attr)

    def _check(self, attr: str) -> None:
        assert attr in self._allowed_attributes, (
            f"Unknown attribute {attr}, allowed values: {self._allowed_attributes}"
        )


class Optimizer:
    """What PopTorch adds to an optimizer: the state on the device."""

    # Attributes of the whole optimizer that torch's class does not have.
    _own: Tuple[str, ...] = ()
    # Attributes of a parameter group.
    _group_attributes: Tuple[str, ...] = ()

    def __init__(self) -> None:
        self._state_dict: Dict[str, Any] = {"ipu_state": None, "ipu_param": None}
        # The device must receive the state kept here / the state kept here is out of date.
        self.ipu_state_is_dirty = False
        self.host_state_is_dirty = False

    def state_dict(self) -> Dict[str, Any]:
        return self.get_state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        torch.optim.Optimizer.load_state_dict(self, state)  # type: ignore[arg-type]
        self.set_state_dict(state)

    def get_state_dict(self) -> Dict[str, Any]:
        # torch's part too, for the learning rate schedulers
        return {**self._state_dict, **torch.optim.Optimizer.state_dict(self)}  # type: ignore

    def set_state_dict(self, state: Dict[str, Any]) -> None:
        if not state:
            raise RuntimeError("Cannot load optimizer state dictionary because it is empty.")
        if not ("ipu_state" in state and "ipu_param" in state):
            raise RuntimeError("Only IPU optimizer states can be loaded onto the IPU.")
        self._state_dict = state
        self.ipu_state_is_dirty = True
        self.host_state_is_dirty = False

    def has_state(self) -> bool:
        return (
            self._state_dict.get("ipu_state") is not None
            and self._state_dict.get("ipu_param") is not None
        )

    def __getstate__(self) -> Dict[str, Any]:
        state = torch.optim.Optimizer.__getstate__(self)  # type: ignore[arg-type]
        for name in (*self._own, "variable_attrs", "_state_dict"):
            state[name] = getattr(self, name)
        state["ipu_state_is_dirty"] = self.has_state()
        state["host_state_is_dirty"] = False
        return state

    def _set_own(self, given: Dict[str, Any], defaults: Dict[str, Any]) -> None:
        """Set the attributes that torch's class does not have, and record which are variable."""
        for name, default in defaults.items():
            value = default if given.get(name) is None else given[name]
            if name.endswith("accum_type"):
                assert value in _ACCUMULATION_TYPES, (
                    "Accumulation types must be either torch.float32 or torch.float16"
                )
            setattr(self, name, value)
        variable = [name for name, value in given.items() if value is not None]
        allowed = [*self.defaults, "loss_scaling"]  # type: ignore[attr-defined]
        self.variable_attrs = VariableAttributes(variable, allowed)


def _arguments(local_variables: Dict[str, Any]) -> Dict[str, Any]:
    return {
        name: value for name, value in local_variables.items() if name not in ("self", "__class__")
    }


def _for_torch(given: Dict[str, Any], own: Tuple[str, ...]) -> Dict[str, Any]:
    """Return the arguments of torch's constructor, and only those the user passed."""
    return {name: value for name, value in given.items() if value is not None and name not in own}


_MOMENT_TYPES: Dict[str, Any] = {
    "accum_type": torch.float32,
    "first_order_momentum_accum_type": torch.float32,
    "second_order_momentum_accum_type": torch.float32,
}


class SGD(Optimizer, torch.optim.SGD):
    _own = (
        "loss_scaling",
        "use_combined_accum",
        "accum_type",
        "velocity_accum_type",
        "max_grad_norm",
    )
    _group_attributes = (
        "lr",
        "momentum",
        "dampening",
        "weight_decay",
        "nesterov",
        "velocity_scaling",
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: Optional[float] = None,
        dampening: Optional[float] = None,
        weight_decay: Optional[float] = None,
        nesterov: Optional[bool] = None,
        maximize: Optional[bool] = None,
        foreach: Optional[bool] = None,
        differentiable: Optional[bool] = None,
        loss_scaling: Optional[float] = None,
        velocity_scaling: Optional[float] = None,
        use_combined_accum: Optional[bool] = None,
        accum_type: Optional[torch.dtype] = None,
        velocity_accum_type: Optional[torch.dtype] = None,
        max_grad_norm: Optional[float] = None,
    ) -> None:
        given = _arguments(locals())
        Optimizer.__init__(self)
        torch.optim.SGD.__init__(self, **_for_torch(given, (*self._own, "velocity_scaling")))
        if use_combined_accum:
            self.defaults["velocity_scaling"] = velocity_scaling or 1.0
            for group in self.param_groups:
                group.setdefault("velocity_scaling", velocity_scaling or 1.0)
        self._set_own(
            given,
            {
                "loss_scaling": 1.0,
                "use_combined_accum": False,
                "accum_type": torch.float32,
                "velocity_accum_type": torch.float32,
                "max_grad_norm": float("Inf"),
            },
        )


class AdamW(Optimizer, torch.optim.AdamW):
    _own = ("loss_scaling", "bias_correction", *_MOMENT_TYPES, "max_grad_norm")
    _group_attributes = ("lr", "betas", "weight_decay", "eps", "amsgrad")

    def __init__(
        self,
        params: Iterable[Any],
        lr: Optional[float] = None,
        betas: Optional[Tuple[float, float]] = None,
        eps: Optional[float] = None,
        weight_decay: Optional[float] = None,
        amsgrad: Optional[bool] = None,
        maximize: Optional[bool] = None,
        foreach: Optional[bool] = None,
        capturable: Optional[bool] = None,
        differentiable: Optional[bool] = None,
        fused: Optional[bool] = None,
        loss_scaling: Optional[float] = None,
        bias_correction: Optional[bool] = None,
        accum_type: Optional[torch.dtype] = None,
        first_order_momentum_accum_type: Optional[torch.dtype] = None,
        second_order_momentum_accum_type: Optional[torch.dtype] = None,
        max_grad_norm: Optional[float] = None,
    ) -> None:
        given = _arguments(locals())
        Optimizer.__init__(self)
        torch.optim.AdamW.__init__(self, **_for_torch(given, self._own))
        self._set_own(
            given,
            {
                "loss_scaling": 1.0,
                "bias_correction": True,
                **_MOMENT_TYPES,
                "max_grad_norm": float("Inf"),
            },
        )


class LAMB(Optimizer, torch.optim.Optimizer):
    # PopTorch keeps max_weight_norm twice: in the groups, and here for its own step.
    _own = ("loss_scaling", "bias_correction", "max_weight_norm", *_MOMENT_TYPES)
    _group_attributes = ("lr", "weight_decay", "betas", "eps", "max_weight_norm")

    def __init__(
        self,
        params: Iterable[Any],
        lr: Optional[float] = None,
        betas: Optional[Tuple[float, float]] = None,
        eps: Optional[float] = None,
        weight_decay: Optional[float] = None,
        bias_correction: Optional[bool] = None,
        loss_scaling: Optional[float] = None,
        max_weight_norm: Optional[float] = None,
        accum_type: Optional[torch.dtype] = None,
        first_order_momentum_accum_type: Optional[torch.dtype] = None,
        second_order_momentum_accum_type: Optional[torch.dtype] = None,
    ) -> None:
        given = _arguments(locals())
        defaults = {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 1e-2,
            "max_weight_norm": 65500.0,
        }
        defaults.update(
            (name, value) for name, value in given.items() if name in defaults and value is not None
        )
        Optimizer.__init__(self)
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._set_own(
            given,
            {
                "loss_scaling": 1.0,
                "bias_correction": True,
                "max_weight_norm": 65500.0,
                **_MOMENT_TYPES,
            },
        )
