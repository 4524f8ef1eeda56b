"""Training: gradients, optimizers, output modes and dtypes."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch

from .models import INPUTS, LABELS, Net, SmallViT, make_options, make_training

OPTIMIZERS: Dict[str, Tuple[Dict[str, Any], Callable[..., Any]]] = {
    "AdamW": ({"lr": 0.01, "weight_decay": 0.1, "eps": 1e-5}, torch.optim.AdamW),
    "SGD": ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("shape", [(1, 7, 1), (4, 7, 2)])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_equals_a_plain_loop(
    both: Tuple[Any, Any], shape: Tuple[int, int, int], kind: str, clip: Any
) -> None:
    poptorch, inspection = both
    iterations, accumulation, replicas = shape
    keywords, reference = OPTIMIZERS[kind]
    size = iterations * accumulation * replicas * 2
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2 * size, 1, 8, 8, generator=generator)
    labels = torch.rand(2 * size, 3, generator=generator).round()
    model = SmallViT(poptorch)
    limits = {} if clip is None else {"max_grad_norm": clip}
    optimizer = getattr(poptorch.optim, kind)(
        model.parameters(), loss_scaling=8.0, **keywords, **limits
    )
    options = make_options(poptorch, iterations, accumulation, replicas)
    options.outputMode(poptorch.OutputMode.All)
    executor = poptorch.trainingModel(model.train(), options, optimizer)
    losses = [executor(images[i : i + size], labels[i : i + size])[1] for i in (0, size)]
    plain = SmallViT()
    expected = _train(
        plain, reference(plain.parameters(), **keywords), images, labels, shape[1:], clip
    )
    assert torch.allclose(torch.cat([loss.reshape(-1) for loss in losses]), expected, atol=1e-6)
    for weight, other in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(weight, other, atol=1e-6)
    assert inspection.executable(executor).num_ipus == 4 * replicas
    assert inspection.executable(executor).optimizer.updates == 2 * iterations


def _train(
    model: Any, optimizer: Any, images: Any, labels: Any, shape: Tuple[int, int], clip: Any
) -> torch.Tensor:
    losses: List[torch.Tensor] = []
    accumulation = shape[0] * shape[1]
    for start in range(0, len(images), 2 * accumulation):
        optimizer.zero_grad()
        for first in range(start, start + 2 * accumulation, 2):
            _, loss = model(images[first : first + 2], labels[first : first + 2])
            (loss / accumulation).backward()
            losses.append(loss.detach())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return torch.stack(losses)


def test_lamb_equals_its_formula(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    model = Net(poptorch)
    old = [weight.detach().clone() for weight in model.parameters()]
    optimizer = poptorch.optim.LAMB(model.parameters(), lr=0.1, weight_decay=0.01)
    poptorch.trainingModel(model, make_options(poptorch), optimizer)(INPUTS[:6], LABELS[:6])
    reference = Net(poptorch)
    for i in range(0, 6, 2):
        (reference(INPUTS[i : i + 2], LABELS[i : i + 2])[1] / 3).backward()
    for weight, start, other in zip(model.parameters(), old, reference.parameters()):
        update = other.grad / (other.grad.abs() + 1e-8) + 0.01 * start
        expected = start - 0.1 * start.norm() / update.norm() * update
        assert torch.allclose(weight, expected, atol=1e-5)


def test_sum_reduction_and_running_mean(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    moved = []
    for kind in (poptorch.ReductionType.Sum, poptorch.ReductionType.Mean):
        model = Net(poptorch)
        before = model.first.weight.detach().clone()
        options = make_options(poptorch)
        options.Training.accumulationAndReplicationReductionType(kind)
        options.Training.setMeanAccumulationAndReplicationReductionStrategy(
            poptorch.MeanReductionStrategy.Running
        )
        optimizer = poptorch.optim.SGD(model.parameters(), lr=1.0)
        executor = poptorch.trainingModel(model, options, optimizer)
        executor(INPUTS, LABELS)
        moved.append(model.first.weight.detach() - before)
        executor.destroy()
    assert torch.allclose(moved[0], 3 * moved[1], atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "rows", "losses"),
    [("All", 24, (12,)), ("Final", 4, (2,)), ("Sum", 4, (2,)), ("EveryN", 12, (6,))],
)
def test_output_modes(both: Tuple[Any, Any], mode: str, rows: int, losses: Any) -> None:
    poptorch, _ = both
    options = make_options(poptorch, 2, 3, 2)
    options.outputMode(poptorch.OutputMode[mode], 2 if mode == "EveryN" else None)
    model = Net(poptorch)
    optimizer = poptorch.optim.SGD(model.parameters(), lr=0.0)
    logits, loss = poptorch.trainingModel(model, options, optimizer)(INPUTS, LABELS)
    assert logits.shape == (rows, 3) and loss.shape == losses
    every = model(INPUTS).detach()
    expected = {"All": every, "Final": every[-4:], "EveryN": every[12:]}
    expected["Sum"] = every.view(6, 4, 3).sum(0)
    assert torch.allclose(logits, expected[mode], atol=1e-5)


def test_single_loss_is_a_scalar(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    assert make_training(poptorch)(INPUTS, LABELS)[1].shape == ()


def test_restored_optimizer_state_repeats_the_run(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    executor = make_training(poptorch)
    optimizer = executor._optimizer
    assert optimizer.state_dict()["ipu_state"] is None
    executor(INPUTS, LABELS)
    weights = {key: value.clone() for key, value in executor.model.state_dict().items()}
    state = optimizer.state_dict()
    slots = [f"{slot}___first.weight" for slot in ("Accl1", "Accl2", "Step")]
    assert set(slots) < set(state["ipu_state"])
    assert state["ipu_state"]["Step___first.weight"] == 1
    assert float(state["ipu_param"]["learningRate___specific___first.weight"]) == pytest.approx(0.1)
    executor(INPUTS, LABELS)
    expected = {key: value.clone() for key, value in executor.model.state_dict().items()}
    executor.destroy()
    model = Net(poptorch)
    model.load_state_dict(weights)
    other = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    other.load_state_dict(state)
    poptorch.trainingModel(model.train(), make_options(poptorch), other)(INPUTS, LABELS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_only_ipu_states_can_be_loaded(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    optimizer = poptorch.optim.AdamW(Net(poptorch).parameters(), lr=0.1)
    assert not optimizer.has_state()
    with pytest.raises(RuntimeError, match="Only IPU optimizer states"):
        optimizer.set_state_dict({"state": {}})


def test_moments_have_the_requested_dtypes(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    model = Net(poptorch)
    optimizer = poptorch.optim.AdamW(
        model.parameters(),
        lr=0.1,
        accum_type=torch.float16,
        first_order_momentum_accum_type=torch.float16,
    )
    executor = poptorch.trainingModel(model, make_options(poptorch), optimizer)
    executor(INPUTS, LABELS)
    state = optimizer.state_dict()["ipu_state"]
    assert state["Accl1___first.weight"].dtype == torch.float16
    assert state["Accl2___first.weight"].dtype == torch.float32
    strategy = executor.options.Training.meanAccumulationAndReplicationReductionStrategy
    assert strategy == poptorch.MeanReductionStrategy.Running
    with pytest.raises(AssertionError, match="Accumulation types"):
        poptorch.optim.AdamW(model.parameters(), accum_type=torch.bfloat16)


def test_training_in_fp16_reduces_the_loss(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    model = SmallViT(poptorch).half()
    options = make_options(poptorch, accumulation=7)
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.001, loss_scaling=64.0)
    executor = poptorch.trainingModel(model.train(), options, optimizer)
    images, labels = torch.randn(7, 1, 8, 8), torch.ones(7, 3)
    losses = [float(executor(images.half(), labels)[1]) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_weights_are_not_cast_to_their_input(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    model = SmallViT(poptorch)
    executor = poptorch.trainingModel(model.train(), make_options(poptorch, accumulation=7))
    with pytest.raises(RuntimeError, match="type"):
        executor(torch.randn(7, 1, 8, 8).half(), torch.ones(7, 3))
