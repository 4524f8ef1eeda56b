"""The optimizer on the device, which reads only the dictionary sent to it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Tuple

import torch
from torch import Tensor

from .errors import compiler_error
from .inspection import log
from .optimizer_dictionary import OptimizerType

_ADAM = (OptimizerType.ADAMW, OptimizerType.ADAMW_NO_BIAS)
_LAMB = (OptimizerType.LAMB, OptimizerType.LAMB_NO_BIAS)

_GROUP_NAMES = {
    "learningRate": "lr",
    "weightDecay": "weight_decay",
    "eps": "eps",
    "momentum": "momentum",
    "dampening": "dampening",
    "nesterov": "nesterov",
    "maxWeightNorm": "max_weight_norm",
}


class DeviceOptimizer:
    """Moments, step counts and hyperparameters on the device.

    Parameters
    ----------
    dictionary
        Result of `optimizer_dictionary`.
    groups
        Name -> device weight, one dictionary per parameter group.
    """

    def __init__(self, dictionary: Dict[str, Any], groups: List[Dict[str, Tensor]]) -> None:
        if len(groups) != len(dictionary["groups"]):
            raise compiler_error("Number of groups mismatch between the graph and the optimizer")
        self.dict = dictionary
        self.type = OptimizerType(dictionary["optimizer_type"])
        self.updates = 0
        self._groups = groups
        self._states: Dict[str, Dict[str, Tensor]] = {}
        param_groups = [
            {"params": list(group.values()), **_hyperparameters(values)}
            for group, values in zip(groups, dictionary["groups"])
        ]
        self.impl = SimpleNamespace(param_groups=param_groups, state=self._states)
        for name, weight, group in self._weights():
            self._states[name] = self._new_state(weight, group)

    @property
    def loss_scaling(self) -> float:
        return float(self.dict["defaults"]["lossScaling"][0])

    @property
    def accumulator_dtype(self) -> torch.dtype:
        return self._dtype("accumType")

    def update(self, dictionary: Dict[str, Any]) -> None:
        """Set new values; those compiled in as constants must be unchanged."""
        if dictionary["optimizer_type"] != self.type:
            raise compiler_error("popart: cannot change the type of a compiled optimizer")
        if len(dictionary["groups"]) != len(self.dict["groups"]):
            raise compiler_error("popart: cannot change the number of parameter groups")
        places = ["defaults", *(f"group {i}" for i in range(len(dictionary["groups"])))]
        old = [self.dict["defaults"], *self.dict["groups"]]
        new = [dictionary["defaults"], *dictionary["groups"]]
        for place, before, after in zip(places, old, new):
            for name, (value, constant) in after.items():
                was, was_constant = before[name]
                if constant != was_constant or (constant and float(value) != float(was)):
                    raise compiler_error(
                        f"popart: {name} ({place}) was compiled as a"
                        f" {'constant' if was_constant else 'variable'}: {was} cannot become"
                        f" {value} ({'constant' if constant else 'variable'}); a valid replacement"
                        " keeps constants"
                    )
        self.dict = dictionary
        for group, values in zip(self.impl.param_groups, dictionary["groups"]):
            group.update(_hyperparameters(values))

    def step(self, gradients: Dict[str, Tensor]) -> None:
        """Update the weights that have a gradient (name -> reduced gradient, unscaled)."""
        limit = self.dict.get("maxGradNorm", float("inf"))
        if limit != float("inf"):
            norm = torch.stack([gradient.float().norm() for gradient in gradients.values()]).norm()
            factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        rule = _adamw if self.type in _ADAM else _lamb if self.type in _LAMB else _sgd
        for name, weight, group in self._weights():
            if name in gradients:
                corrected = self.type != OptimizerType.LAMB_NO_BIAS
                rule(weight, gradients[name], self._states[name], group, corrected)
        self.updates += 1

    def read(self) -> Dict[str, Dict[str, Tensor]]:
        """Return the state in the form of `optimizer.state_dict()`."""
        state: Dict[str, Tensor] = {}
        values: Dict[str, Tensor] = {}
        for (name, _, _), (numbers, group) in zip(self._weights(), self._values()):
            for slot, tensor in self._states[name].items():
                state[f"{slot}___{name}"] = tensor.clone()
            for key, number in self._specific(numbers, group).items():
                values[f"{key}___specific___{name}"] = torch.tensor(float(number))
        if not self.dict["defaults"]["lossScaling"][1]:
            values["lossScaling_FLOAT"] = torch.tensor(self.loss_scaling)
        return {"ipu_state": state, "ipu_param": values}

    def write(self, state: Dict[str, Any]) -> None:
        """Set a state that `read` returned; missing entries keep their value and log a warning."""
        given = state["ipu_state"] or {}
        for name, slots in self._states.items():
            for slot, tensor in slots.items():
                key = f"{slot}___{name}"
                if key in given:
                    tensor.copy_(given[key])
                else:
                    log().record("warning", f"writeOptimizerState: ignoring missing state {key}")

    def _specific(self, values: Dict[str, Any], group: Dict[str, Any]) -> Dict[str, float]:
        """Return the values of a weight that are tensors on the device: the variable ones."""
        if self.type not in (*_ADAM, *_LAMB):
            kept = 1 - group["dampening"]
            return {
                "scaledLearningRate0": group["lr"] * kept / self.loss_scaling,
                "weightDecayScaleFactor0": 1 - group["lr"] * kept * group["weight_decay"],
            }
        return {name: value for name, (value, constant) in values.items() if not constant}

    def _weights(self) -> Iterator[Tuple[str, Tensor, Dict[str, Any]]]:
        for weights, group in zip(self._groups, self.impl.param_groups):
            for name, weight in weights.items():
                yield name, weight, group

    def _values(self) -> Iterator[Tuple[Dict[str, Any], Dict[str, Any]]]:
        places = zip(self._groups, self.dict["groups"], self.impl.param_groups)
        for weights, values, group in places:
            for _ in weights:
                yield values, group

    def _new_state(self, weight: Tensor, group: Dict[str, Any]) -> Dict[str, Tensor]:
        if self.type in (*_ADAM, *_LAMB):
            return {
                "Accl1": torch.zeros(
                    weight.shape, dtype=self._dtype("firstOrderMomentumAccumType")
                ),
                "Accl2": torch.zeros(
                    weight.shape, dtype=self._dtype("secondOrderMomentumAccumType")
                ),
                "Step": torch.zeros(()),
            }
        if group["momentum"]:
            return {"Accl1": torch.zeros(weight.shape, dtype=self._dtype("velocityAccumType"))}
        return {}

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float16 if self.dict[name] else torch.float32


def _hyperparameters(values: Dict[str, Any]) -> Dict[str, Any]:
    result = {ours: values[name][0] for name, ours in _GROUP_NAMES.items() if name in values}
    if "beta1" in values:
        result["betas"] = (values["beta1"][0], values["beta2"][0])
    return result


def _moments(
    gradient: Tensor, state: Dict[str, Tensor], group: Dict[str, Any], corrected: bool
) -> Tuple[Tensor, Tensor, float, float]:
    """Update both moments; return them in fp32 with their bias corrections."""
    state["Step"] += 1
    step = float(state["Step"])
    beta1, beta2 = group["betas"]
    first = state["Accl1"].float().lerp(gradient, 1 - beta1)
    second = state["Accl2"].float().mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
    state["Accl1"].copy_(first)
    state["Accl2"].copy_(second)
    if not corrected:
        return first, second, 1.0, 1.0
    return first, second, 1 - beta1**step, 1 - beta2**step


def _adamw(
    weight: Tensor, gradient: Tensor, state: Dict[str, Tensor], group: Any, corrected: bool
) -> None:
    # Also with bias_correction=False: PopTorch 3.4 compiles both to the same operation.
    first, second, bias1, bias2 = _moments(gradient.float(), state, group, True)
    new = weight.float() * (1 - group["lr"] * group["weight_decay"])
    denominator = (second.sqrt() / math.sqrt(bias2)).add_(group["eps"])
    weight.copy_(new.addcdiv_(first, denominator, value=-group["lr"] / bias1))


def _lamb(
    weight: Tensor, gradient: Tensor, state: Dict[str, Tensor], group: Any, corrected: bool
) -> None:
    first, second, bias1, bias2 = _moments(gradient.float(), state, group, corrected)
    old = weight.float()
    update = (first / bias1) / ((second / bias2).sqrt() + group["eps"])
    update = update + group["weight_decay"] * old
    size, change = old.norm().clamp(max=group["max_weight_norm"]), update.norm()
    trust = float(size / change) if size > 0 and change > 0 else 1.0
    weight.copy_(old - group["lr"] * trust * update)


def _sgd(
    weight: Tensor, gradient: Tensor, state: Dict[str, Tensor], group: Any, corrected: bool
) -> None:
    old = weight.float()
    direction = gradient.float() + group["weight_decay"] * old
    if "Accl1" in state:
        velocity = state["Accl1"].float()
        # The first update is not dampened.
        kept = 1 - group["dampening"] if float(velocity.abs().sum()) else 1.0
        velocity = velocity * group["momentum"] + direction * kept
        state["Accl1"].copy_(velocity)
        direction = direction + group["momentum"] * velocity if group["nesterov"] else velocity
    weight.copy_(old - group["lr"] * direction)
