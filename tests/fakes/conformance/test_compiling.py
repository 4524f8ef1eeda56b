"""Compilation: which models and options are refused."""

from __future__ import annotations

from typing import Any, Tuple

import pytest
import torch
import torch.nn.functional as F

from .models import INPUTS, LABELS, Net, make_options, make_training


def test_inference_refuses_gradient_accumulation(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    with pytest.raises(poptorch.Error, match="gradientAccumulation to 1"):
        poptorch.inferenceModel(Net(poptorch), make_options(poptorch))


def test_pipelines_need_enough_micro_batches(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    training = make_training(poptorch, accumulation=2)
    with pytest.raises(poptorch.Error, match=r"number of pipeline stages \(3\)"):
        training.compile(INPUTS, LABELS)
    inference = poptorch.inferenceModel(Net(poptorch))
    with pytest.raises(poptorch.Error, match=r"deviceIterations.*stages \(2\)"):
        inference.compile(INPUTS)
    sharded = poptorch.Options().setExecutionStrategy(poptorch.ShardedExecution())
    poptorch.inferenceModel(Net(poptorch), sharded).compile(INPUTS)


def test_ipus_are_reserved_in_powers_of_two(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    sharded = poptorch.Options().setExecutionStrategy(poptorch.ShardedExecution())
    with pytest.raises(poptorch.Error, match=r"reserve a minimum of 4"):
        poptorch.inferenceModel(Net(poptorch, (0, 2)), sharded.clone()).compile(INPUTS)
    rounded = poptorch.inferenceModel(Net(poptorch, (0, 2)), sharded.autoRoundNumIPUs(True))
    rounded.compile(INPUTS)
    assert inspection.executable(rounded).num_ipus == 4


def test_too_few_ipus_are_refused(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    assert poptorch.ipuHardwareIsAvailable(16) and not poptorch.ipuHardwareIsAvailable(17)
    inspection.config().available_ipus = 1
    with pytest.raises(poptorch.Error, match=r"Failed to acquire 2 IPU\(s\)"):
        make_training(poptorch).compile(INPUTS, LABELS)
    inspection.config().hardware_version = 0
    assert not poptorch.ipuHardwareIsAvailable()
    with pytest.raises(AssertionError, match="No IPU hardware"):
        poptorch.ipuHardwareVersion()


class Blocks(torch.nn.Module):
    """Runs additions in blocks: an IPU, or None for outside any block."""

    def __init__(self, poptorch: Any, *ipus: Any) -> None:
        super().__init__()
        self.weight, self.ipus, self.block = torch.nn.Parameter(torch.ones(1)), ipus, poptorch.Block

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for number, ipu in enumerate(self.ipus):
            if ipu is None:
                inputs = inputs + self.weight
            else:
                with self.block(f"block{number}", ipu_id=ipu):
                    inputs = inputs + self.weight
        return inputs


def test_every_operation_must_run_in_a_block(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    options = poptorch.Options().deviceIterations(4)
    with pytest.raises(poptorch.Error, match="No active Block"):
        poptorch.inferenceModel(Blocks(poptorch, 0, 1, None), options).compile(INPUTS)
    with pytest.raises(poptorch.Error, match="stage ids must not decrease"):
        poptorch.inferenceModel(Blocks(poptorch, 0, 1, 0), options).compile(INPUTS)
    before = poptorch.inferenceModel(Blocks(poptorch, None, 0, 1), options)
    before.compile(INPUTS)
    assert inspection.executable(before).blocks == [(0, -1, 0), (1, -1, 1)]
    incremented = options.clone().setExecutionStrategy(
        poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement)
    )
    poptorch.inferenceModel(Blocks(poptorch, 0, 1, 0), incremented).compile(INPUTS)


def test_a_module_begins_only_one_block(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    model = Net(poptorch)
    with pytest.raises(poptorch.Error, match="already been assigned to a block"):
        poptorch.BeginBlock(model.first, ipu_id=0)
    assert inspection.annotations(model) == {"first": ("first", 0), "second": ("second", 1)}
    poptorch.removeBlocks(model)
    assert inspection.annotations(model) == {}


def test_explicit_stages(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    strategy = poptorch.PipelinedExecution(poptorch.Stage("first").ipu(1), "second")
    options = poptorch.Options().deviceIterations(4).setExecutionStrategy(strategy)
    executor = poptorch.inferenceModel(Net(poptorch), options)
    executor.compile(INPUTS)
    assert inspection.executable(executor).blocks == [(0, -1, 1), (1, -1, 1)]
    with pytest.raises(AssertionError, match="more than one stage"):
        poptorch.PipelinedExecution("first", "first")
    unknown = poptorch.Options().setExecutionStrategy(poptorch.PipelinedExecution("first"))
    with pytest.raises(AssertionError, match="Unknown Block"):
        poptorch.inferenceModel(Net(poptorch), unknown).compile(INPUTS)


def test_inputs_are_fixed_by_compilation(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    executor = poptorch.inferenceModel(Net(poptorch), poptorch.Options().deviceIterations(2))
    with pytest.raises(AssertionError, match="Invalid batch dimension"):
        executor(INPUTS[:3])
    executor(INPUTS)
    for wrong, message in (
        ((INPUTS[:12],), "Shape mismatch"),
        ((INPUTS.double(),), "Data type mismatch"),
        ((INPUTS, LABELS), "Type mismatch"),
        ((), "Mandatory parameter inputs missing"),
    ):
        with pytest.raises(poptorch.Error, match=message):
            executor(*wrong)
    with pytest.raises(AssertionError, match="Too many arguments"):
        executor(INPUTS, None, None)


def test_exactly_one_loss_is_required(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both

    def squares(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ((logits - labels) ** 2).mean()

    def two(logits: torch.Tensor, labels: torch.Tensor) -> Any:
        return F.mse_loss(logits, labels), F.l1_loss(logits, labels)

    def both_marked(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = F.mse_loss(logits, labels) + F.l1_loss(logits, labels)
        return poptorch.identity_loss(total, reduction="mean")

    for loss, message in (
        (squares, "Couldn't find a loss"),
        (two, "Multiple independent losses"),
    ):
        executor = make_training(poptorch, Net(poptorch, loss=loss))
        with pytest.raises(poptorch.Error, match=message):
            executor.compile(INPUTS, LABELS)
    make_training(poptorch, Net(poptorch, loss=both_marked)).compile(INPUTS, LABELS)


def test_only_the_marked_loss_is_propagated(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    weights = []
    for scale, mark in ((1, False), (100, False), (100, True)):

        def loss(logits: torch.Tensor, labels: Any, scale: int = scale, mark: bool = mark) -> Any:
            scaled = F.mse_loss(logits, labels) * scale
            return poptorch.identity_loss(scaled, reduction="none") if mark else scaled

        model = Net(poptorch, loss=loss)
        optimizer = poptorch.optim.SGD(model.parameters(), lr=0.001)
        executor = poptorch.trainingModel(model, make_options(poptorch), optimizer)
        _, returned = executor(INPUTS, LABELS)
        with pytest.raises(poptorch.Error, match="backward"):
            returned.backward()
        weights.append(model.first.weight.detach().clone())
        executor.destroy()
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-4)


def test_tracing_refuses_reading_values(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake

    class Branching(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert poptorch.isRunningOnIpu()
            return super().forward(inputs) if inputs.sum() > 0 else inputs

    assert not poptorch.isRunningOnIpu()
    with pytest.raises(poptorch.Error, match="aten::item"):
        poptorch.inferenceModel(Branching(6, 6)).compile(INPUTS)


def test_training_modes_are_those_at_compilation(fake: Tuple[Any, Any]) -> None:
    poptorch, inspection = fake
    model = Net(poptorch).train()
    executor = poptorch.inferenceModel(model, poptorch.Options().deviceIterations(2))
    model.eval()  # too late for the root module, which the executor has copied
    executor.compile(INPUTS)
    modes = inspection.executable(executor).modes
    assert modes == {"<root>": True, "first": False, "second": False}
    assert inspection.executable(executor).model.training


def test_wrapping_twice_is_refused(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    model = Net(poptorch)
    executor = make_training(poptorch, model)
    assert type(model).__name__ == "PoptorchNet"
    with pytest.raises(RuntimeError, match="already been wrapped"):
        poptorch.trainingModel(model)
    executor.compile(INPUTS, LABELS)
    executor.destroy()
    assert type(model) is Net and type(model.first.weight) is torch.nn.Parameter
    make_training(poptorch, model).compile(INPUTS, LABELS)


@pytest.mark.parametrize("cls", [torch.optim.Adagrad, torch.optim.Adadelta])
def test_unsupported_optimizers_are_refused(both: Tuple[Any, Any], cls: Any) -> None:
    poptorch, _ = both
    model = Net(poptorch)
    with pytest.raises(AssertionError, match="Unsupported optimizer type"):
        poptorch.trainingModel(model, make_options(poptorch), cls(model.parameters()))
