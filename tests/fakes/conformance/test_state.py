"""Weights, optimizer state and random state between host and device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Tuple

import pytest
import torch
import torch.nn.functional as F

from .models import INPUTS, LABELS, device_weights, make_training


def test_optimizer_changes_need_set_optimizer(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    executor = make_training(poptorch)
    optimizer = executor._optimizer
    executor(INPUTS, LABELS)
    groups = inspection.executable(executor).optimizer.impl.param_groups
    optimizer.param_groups[0]["lr"] = 0.01
    executor(INPUTS, LABELS)
    assert groups[0]["lr"] == 0.1
    executor.setOptimizer(optimizer)
    assert groups[0]["lr"] == 0.01
    optimizer.param_groups[0]["weight_decay"] = 0.5  # not passed to the constructor
    with pytest.raises(poptorch.Error, match="constant"):
        executor.setOptimizer(optimizer)


def test_attributes_can_be_marked_as_variable(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    executor = make_training(poptorch)
    optimizer = executor._optimizer
    assert optimizer.variable_attrs.isConstant("weight_decay")
    optimizer.variable_attrs.markAsVariable("weight_decay")
    with pytest.raises(AssertionError, match="Unknown attribute"):
        optimizer.variable_attrs.markAsConstant("nothing")
    executor.setOptimizer(optimizer)
    executor.compile(INPUTS, LABELS)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    executor.setOptimizer(optimizer)
    assert inspection.executable(executor).optimizer.impl.param_groups[0]["weight_decay"] == 0.5


def test_device_has_its_own_weights(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    executor = make_training(poptorch)
    model = executor.model
    weight = model.first.weight
    executor(INPUTS, LABELS)
    copies = len(inspection.log().calls("copyWeightsToHost_impl"))
    assert torch.equal(weight, device_weights(inspection, executor)["first.weight"])
    assert model.state_dict() and weight.sum() and list(model.parameters())
    assert len(inspection.log().calls("copyWeightsToHost_impl")) == copies + 1
    with torch.no_grad():
        weight.fill_(5.0)
    assert not (device_weights(inspection, executor)["first.weight"] == 5).any()
    executor.copyWeightsToDevice()
    assert (device_weights(inspection, executor)["first.weight"] == 5).all()
    changed = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    executor.load_state_dict(changed)
    assert (device_weights(inspection, executor)["first.weight"] == 1).all()


def test_inference_uses_the_trained_weights(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    training = make_training(poptorch)
    inference = poptorch.inferenceModel(training, poptorch.Options().deviceIterations(2))
    before = inference(INPUTS)
    training(INPUTS, LABELS)
    inspection.log().clear()
    after = inference(INPUTS)
    assert not torch.equal(before, after)
    inference(INPUTS)
    names = inspection.log().names()
    assert names.count("copyWeightsToHost_impl") == names.count("copyWeightsToDevice_impl") == 1


def test_wrapped_model_can_be_copied_and_pickled(both: Tuple[Any, Any], tmp_path: Path) -> None:
    poptorch, _ = both
    executor = make_training(poptorch)
    executor(INPUTS, LABELS)
    state = executor.model.state_dict()
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt").keys() == state.keys()


class Dropping(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.dropout(inputs * self.scale, training=True)


def test_device_random_generator(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    executor = poptorch.inferenceModel(Dropping(), poptorch.Options().randomSeed(0))
    torch.manual_seed(7)
    host = torch.get_rng_state()
    first = executor(INPUTS)
    assert torch.equal(torch.get_rng_state(), host)
    state = executor.rng_state
    assert state[0] == 0 and len(state) > 1
    second = executor(INPUTS)
    assert not torch.equal(first, second)
    executor.rng_state = state
    assert torch.equal(executor(INPUTS), second)
    again = poptorch.inferenceModel(Dropping(), poptorch.Options().randomSeed(0))
    assert torch.equal(again(INPUTS), first)
    unseeded = poptorch.inferenceModel(Dropping())
    unseeded.compile(INPUTS)
    assert unseeded.rng_state is None


def test_attach_and_detach_must_alternate(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    executor = make_training(poptorch)
    with pytest.raises(poptorch.Error, match="not been compiled"):
        executor.detachFromDevice()
    executor(INPUTS, LABELS)
    with pytest.raises(poptorch.Error, match="Device is already attached"):
        executor.attachToDevice()
    executor.detachFromDevice()
    assert not executor.isAttachedToDevice() and executor.isCompiled()
    names = inspection.log().names()
    fetched = ["copyWeightsToHost_impl", "readOptimizerState", "detachFromDevice"]
    assert names[-3:] == fetched
    with pytest.raises(poptorch.Error, match="Device is not attached"):
        executor.detachFromDevice()
    executor(INPUTS, LABELS)  # attaches
    assert executor.isAttachedToDevice()


def test_an_ipu_belongs_to_one_executor_at_a_time(fake: Tuple[Any, Any]) -> None:
    poptorch, inspection = fake
    inspection.config().available_ipus = 2
    training = make_training(poptorch)
    training(INPUTS, LABELS)
    inference = poptorch.inferenceModel(training.model, poptorch.Options().deviceIterations(2))
    with pytest.raises(poptorch.Error, match=r"Failed to acquire 2 IPU\(s\)"):
        inference(INPUTS)
    training.detachFromDevice()
    inference(INPUTS)
    with pytest.raises(poptorch.Error, match=r"Failed to acquire 2 IPU\(s\)"):
        training.attachToDevice()
    inference.detachFromDevice()
    training.attachToDevice()
    training.destroy()
    inference.attachToDevice()


@pytest.mark.parametrize("way", ["connectionType", "useOfflineIpuTarget"])
def test_offline_connection_compiles_only(both: Tuple[Any, Any], way: str) -> None:
    poptorch, inspection = both
    inspection.config().available_ipus = 0
    value = 2 if way == "useOfflineIpuTarget" else poptorch.ConnectionType.Never
    executor = make_training(poptorch, **{way: value})
    executor.compile(INPUTS, LABELS)
    assert executor.isCompiled() and not executor.isAttachedToDevice()
    assert "loadEngineAndConnectStreams" not in inspection.log().names()
    with pytest.raises(AssertionError, match="offline"):
        executor(INPUTS, LABELS)
    with pytest.raises(AssertionError, match="offline"):
        executor.attachToDevice()


def test_ipu_model_counts_no_cycles(fake: Tuple[Any, Any]) -> None:
    poptorch, inspection = fake
    inspection.config().available_ipus = 0
    make_training(poptorch, useIpuModel=True)(INPUTS, LABELS)
    counted = make_training(poptorch, useIpuModel=True, logCycleCount=True)
    with pytest.raises(poptorch.Error, match="actual IPU hardware"):
        counted.compile(INPUTS, LABELS)


def test_measurements(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    executor = make_training(poptorch)
    with pytest.raises(poptorch.Error, match="compile the model"):
        executor.compilationTime()
    with pytest.raises(poptorch.Error, match="logCycleCount"):
        executor.cycleCount()
    counted = make_training(poptorch, logCycleCount=True)
    counted(INPUTS, LABELS)
    assert counted.cycleCount() > 0


def test_executable_cache(fake: Tuple[Any, Any], tmp_path: Path) -> None:
    poptorch, inspection = fake

    def compiled(**options: Any) -> Any:
        executor = make_training(poptorch, enableExecutableCaching=str(tmp_path), **options)
        executor.compile(INPUTS, LABELS)
        assert executor.compilationTime().total_seconds() > 0
        return inspection.executable(executor)

    assert not compiled(randomSeed=1).cache_hit
    assert compiled(randomSeed=2).cache_hit
    assert not compiled(iterations=2).cache_hit
    assert len(list(tmp_path.glob("*.popef"))) == 2
