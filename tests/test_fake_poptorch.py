"""The stand-in for PopTorch: like the real front end, and as strict.

What both can do is tested on both, where POPTORCH_SRC is set to a checkout of graphcore/poptorch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import torch
import torch.nn.functional as F
from fakes import comparison, loading, record_api

INPUTS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.rand(24, 3, generator=torch.Generator().manual_seed(2)).round()

needs_front_end = pytest.mark.skipif(
    loading.available() is not None, reason=str(loading.available())
)


@pytest.fixture
def fake() -> Iterator[Tuple[Any, Any]]:
    with loading.stand_in() as modules:
        yield modules


@pytest.fixture(params=["stand-in", pytest.param("front end", marks=needs_front_end)])
def both(request: pytest.FixtureRequest) -> Iterator[Tuple[Any, Any]]:
    """The stand-in, then the real front end."""
    context = loading.stand_in if request.param == "stand-in" else loading.frontend
    with context() as modules:
        yield modules


class Net(torch.nn.Module):
    """Two layers, by default on two IPUs."""

    def __init__(self, poptorch: Any, ipus: Tuple[int, ...] = (0, 1), loss: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)
        for name, ipu in zip(("first", "second"), ipus):
            poptorch.BeginBlock(getattr(self, name), name, ipu_id=ipu)
        self.loss = loss or F.binary_cross_entropy_with_logits

    def forward(self, inputs: torch.Tensor, labels: Any = None) -> Any:
        logits = self.second(torch.tanh(self.first(inputs)))
        return logits if labels is None else (logits, self.loss(logits, labels))


def make_options(
    poptorch: Any, iterations: int = 1, accumulation: int = 3, replicas: int = 1, **calls: Any
) -> Any:
    options = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas)
    options.Training.gradientAccumulation(accumulation)
    for name, value in calls.items():
        getattr(options, name)(value)
    return options


def make_training(poptorch: Any, model: Any = None, **options: Any) -> Any:
    model = Net(poptorch) if model is None else model
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    return poptorch.trainingModel(model.train(), make_options(poptorch, **options), optimizer)


def device_weights(inspection: Any, executor: Any) -> Dict[str, torch.Tensor]:
    return dict(inspection.executable(executor).model.named_parameters())


# The surface.


def test_surface_is_that_of_the_recording(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    recorded = json.loads(record_api.API_FILE.read_text(encoding="utf-8"))
    assert json.loads(record_api.as_text(record_api.describe(poptorch))) == recorded


def _run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(loading.FAKES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_front_end
def test_recording_is_that_of_the_front_end() -> None:
    printed = _run("record_api.py", "--print")
    assert printed == record_api.API_FILE.read_text(encoding="utf-8")
    recorded = json.loads(record_api.OPTIONS_FILE.read_text(encoding="utf-8"))
    assert record_api.session_options(Path(os.environ["POPTORCH_SRC"])) == recorded


@needs_front_end
def test_same_calls_give_the_same_as_the_front_end(fake: Tuple[Any, Any]) -> None:
    real = json.loads(_run("comparison.py").splitlines()[-1])
    ours = comparison.everything(*fake)
    assert ours["options"] == real["options"]
    assert ours["optimizers"] == real["optimizers"]
    for what in ("log", "facts", "annotations"):
        assert ours["training"][what] == real["training"][what]
    for what in ("results", "state", "weights"):
        assert _rounded(ours["training"][what]) == _rounded(real["training"][what])


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_rounded(value) for value in content]
    return pytest.approx(content, abs=1e-6)


def test_stand_in_leaves_nothing_behind() -> None:
    with loading.stand_in() as (poptorch, inspection):
        Net(poptorch)
        inspection.log().record("something")
        inspection.config().available_ipus = 1
    assert "poptorch" not in sys.modules
    assert str(loading.FAKES) not in sys.path
    with loading.stand_in() as (_, inspection):
        assert inspection.log() == []
        assert inspection.config().available_ipus == 16


# Training.


class SmallViT(torch.nn.Module):
    """A patch embedding, a class token, three encoder layers and a head, on four IPUs."""

    def __init__(self, poptorch: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = torch.nn.Conv2d(1, 8, kernel_size=4, stride=4)
        self.token = torch.nn.Parameter(torch.randn(1, 1, 8))
        self.positions = torch.nn.Parameter(torch.randn(1, 5, 8))
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))
        self.head = torch.nn.Linear(8, 3)
        self.mark = (lambda loss: loss) if poptorch is None else poptorch.identity_loss
        if poptorch is not None:
            self.mark = lambda loss: poptorch.identity_loss(loss, reduction="none")
            for ipu, module in enumerate([self.patches, *self.layers]):
                poptorch.BeginBlock(module, f"block{ipu}", ipu_id=ipu)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = self.patches(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.token.expand(len(hidden), -1, -1), hidden], 1) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden[:, 0])
        return logits, self.mark(F.binary_cross_entropy_with_logits(logits.float(), labels))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
        # No bias: that of the keys has no gradient but rounding, which AdamW makes large.
        self.query, self.out = torch.nn.Linear(8, 24, bias=False), torch.nn.Linear(8, 8)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query(self.before(hidden)).chunk(3, -1)
        scores = (query @ key.transpose(1, 2) / 8**0.5).softmax(-1)
        hidden = hidden + self.out(scores @ value)
        return hidden + self.mlp(self.after(hidden))


OPTIMIZERS: Dict[str, Tuple[Dict[str, Any], Callable[..., Any]]] = {
    "AdamW": ({"lr": 0.01, "weight_decay": 0.1, "eps": 1e-5}, torch.optim.AdamW),
    "SGD": ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("shape", [(1, 7, 1), (4, 7, 2)])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_trains_as_a_plain_loop(
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


def test_lamb_as_written_down(both: Tuple[Any, Any]) -> None:
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


def test_a_single_loss_has_no_dimension(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    assert make_training(poptorch)(INPUTS, LABELS)[1].shape == ()


def test_optimizer_state_goes_on_bit_for_bit(both: Tuple[Any, Any]) -> None:
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


def test_only_ipu_states_are_loaded(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    optimizer = poptorch.optim.AdamW(Net(poptorch).parameters(), lr=0.1)
    assert not optimizer.has_state()
    with pytest.raises(RuntimeError, match="Only IPU optimizer states"):
        optimizer.set_state_dict({"state": {}})


def test_moments_have_the_types_asked_for(fake: Tuple[Any, Any]) -> None:
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


def test_half_precision(fake: Tuple[Any, Any]) -> None:
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


# Options.


def test_options_freeze(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    options = make_options(poptorch)
    executor = poptorch.trainingModel(Net(poptorch), options)
    for change in (
        lambda: options.deviceIterations(2),
        lambda: options.Training.gradientAccumulation(4),
        lambda: options._Popart.set("enableOutlining", True),
        lambda: options.Precision.enableStochasticRounding(True),
    ):
        with pytest.raises(AttributeError, match="Can't modify frozen Options"):
            change()
    assert executor.options is not options
    options.clone().deviceIterations(2)
    loaded = make_options(poptorch)
    poptorch.DataLoader(loaded, torch.utils.data.TensorDataset(INPUTS))
    with pytest.raises(AttributeError, match="frozen"):
        loaded.deviceIterations(2)


def test_options_keep_their_types(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    options = poptorch.Options()
    for call in (
        lambda: options.deviceIterations(2.0),
        lambda: options.Training.gradientAccumulation("4"),
        lambda: options.outputMode(2),
        lambda: options.outputMode(poptorch.OutputMode.EveryN),
        lambda: options.randomSeed("0"),
        lambda: options.setAvailableMemoryProportion({"0": 0.1}),
        lambda: options.setExecutionStrategy("pipelined"),
        lambda: options.connectionType(0),
        lambda: options.TensorLocations.setOptimizerLocation({}),
        lambda: poptorch.TensorLocationSettings().useOnChipStorage(1),
        lambda: options.toDict(),  # No output mode was chosen.
    ):
        with pytest.raises(AssertionError):
            call()
    for refused in (
        lambda: options.Training.accumulationAndReplicationReductionType("Mean"),
        lambda: options.Precision.setPartialsType(torch.bfloat16),
    ):
        with pytest.raises(ValueError, match=r"."):
            refused()
    with pytest.raises(AttributeError, match="Invalid attribute"):
        options.no_such_option  # noqa: B018
    options.deviceIterations(3)
    options.device_iterations += 1
    assert (options.device_iterations, options.replication_factor) == (4, 1)
    assert options.exists("device_iterations") and not options.exists("random_seed")


def test_random_seed_seeds_the_host_too(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    poptorch.Options().randomSeed(5)
    assert torch.initial_seed() == 5


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("noSuchOption", 3, "uint64"),
        ("autoRecomputation", True, "bool"),
        ("timeLimitScheduler", 1, "uint64"),
        ("enableOutlining", 1, "uint64"),
        ("cachePath", ["a"], "set / vector"),
    ],
)
def test_options_of_the_compiler(both: Tuple[Any, Any], name: str, value: Any, kind: str) -> None:
    poptorch, _ = both
    options = make_options(poptorch)
    options._Popart.set(name, value)
    executor = poptorch.trainingModel(Net(poptorch), options)
    with pytest.raises(poptorch.Error, match=f"Unknown {kind} option {name}"):
        executor.compile(INPUTS, LABELS)


# Compiling.


def test_inference_does_not_accumulate(both: Tuple[Any, Any]) -> None:
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


def test_ipus_come_in_powers_of_two(both: Tuple[Any, Any]) -> None:
    poptorch, inspection = both
    sharded = poptorch.Options().setExecutionStrategy(poptorch.ShardedExecution())
    with pytest.raises(poptorch.Error, match=r"reserve a minimum of 4"):
        poptorch.inferenceModel(Net(poptorch, (0, 2)), sharded.clone()).compile(INPUTS)
    rounded = poptorch.inferenceModel(Net(poptorch, (0, 2)), sharded.autoRoundNumIPUs(True))
    rounded.compile(INPUTS)
    assert inspection.executable(rounded).num_ipus == 4


def test_there_must_be_enough_ipus(both: Tuple[Any, Any]) -> None:
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
    """Runs additions in blocks: (IPU or None for outside, how often)."""

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


def test_everything_runs_in_a_block(both: Tuple[Any, Any]) -> None:
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


def test_a_module_begins_one_block(both: Tuple[Any, Any]) -> None:
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


def test_inputs_are_fixed_when_compiled(both: Tuple[Any, Any]) -> None:
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


def test_exactly_one_loss(both: Tuple[Any, Any]) -> None:
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


def test_no_values_while_tracing(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake

    class Branching(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert poptorch.isRunningOnIpu()
            return super().forward(inputs) if inputs.sum() > 0 else inputs

    assert not poptorch.isRunningOnIpu()
    with pytest.raises(poptorch.Error, match="aten::item"):
        poptorch.inferenceModel(Branching(6, 6)).compile(INPUTS)


def test_modes_are_those_at_compilation(fake: Tuple[Any, Any]) -> None:
    poptorch, inspection = fake
    model = Net(poptorch).train()
    executor = poptorch.inferenceModel(model, poptorch.Options().deviceIterations(2))
    model.eval()  # Too late for the root, of which the executor has a copy.
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
def test_unsupported_optimizers(both: Tuple[Any, Any], cls: Any) -> None:
    poptorch, _ = both
    model = Net(poptorch)
    with pytest.raises(AssertionError, match="Unsupported optimizer type"):
        poptorch.trainingModel(model, make_options(poptorch), cls(model.parameters()))


# The optimizer, the weights and the random generator between host and device.


def test_optimizer_changes_go_through_set_optimizer(both: Tuple[Any, Any]) -> None:
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
    optimizer.param_groups[0]["weight_decay"] = 0.5  # Not given to the constructor.
    with pytest.raises(poptorch.Error, match="constant"):
        executor.setOptimizer(optimizer)


def test_attributes_can_be_marked(both: Tuple[Any, Any]) -> None:
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


def test_weights_of_the_device_are_its_own(both: Tuple[Any, Any]) -> None:
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


def test_inference_follows_training(both: Tuple[Any, Any]) -> None:
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


def test_a_model_can_be_copied_and_pickled(both: Tuple[Any, Any], tmp_path: Path) -> None:
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


def test_random_generator_of_the_device(both: Tuple[Any, Any]) -> None:
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


def test_attach_and_detach_are_balanced(both: Tuple[Any, Any]) -> None:
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
    executor(INPUTS, LABELS)  # Attaches.
    assert executor.isAttachedToDevice()


def test_an_ipu_works_for_one_executor(fake: Tuple[Any, Any]) -> None:
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
def test_never_connected(both: Tuple[Any, Any], way: str) -> None:
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


def test_ipu_model(fake: Tuple[Any, Any]) -> None:
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


# Loading.


def numbers(size: int) -> torch.utils.data.Dataset:
    return torch.utils.data.TensorDataset(torch.arange(float(size)), torch.arange(size))


def batches(poptorch: Any, dataset: Any, options: Any = None, **keywords: Any) -> List[List[int]]:
    options = make_options(poptorch, 2, 3) if options is None else options
    loader = poptorch.DataLoader(options, dataset, batch_size=2, **keywords)
    try:
        result = [batch[1].tolist() for batch in loader]
        assert len(loader) == len(result)
        return result
    finally:
        loader.terminate()


@pytest.mark.parametrize("workers", [0, 1])
def test_combined_batches(both: Tuple[Any, Any], workers: int) -> None:
    poptorch, _ = both
    loader = poptorch.DataLoader(make_options(poptorch, 2, 3), numbers(30), batch_size=2)
    assert loader.combinedBatchSize == 12 and len(loader) == 2
    assert batches(poptorch, numbers(30), num_workers=workers) == [
        list(range(12)),
        list(range(12, 24)),
    ]
    short = batches(poptorch, numbers(30), num_workers=workers, drop_last=False)
    assert short[-1] == list(range(24, 30))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("mode", ["Async", "AsyncRebatched"])
def test_asynchronous_batches(fake: Tuple[Any, Any], mode: str, drop_last: bool) -> None:
    poptorch, _ = fake
    keywords: Dict[str, Any] = {"mode": poptorch.DataLoaderMode[mode], "drop_last": drop_last}
    if mode == "AsyncRebatched":
        keywords["rebatched_worker_size"] = 5
    given = batches(poptorch, numbers(30), **keywords)
    assert given == batches(poptorch, numbers(30), drop_last=drop_last)


def test_asynchronous_buffers_are_used_again(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    loader = poptorch.DataLoader(
        make_options(poptorch), numbers(36), batch_size=2, mode=poptorch.DataLoaderMode.Async
    )
    for _ in range(2):
        iterator = iter(loader)
        first = next(iterator)
        assert isinstance(first, list) and first[1].tolist() == list(range(6))
        next(iterator)
        # Given back by the second call, and filled with the fourth of a ring of three.
        assert first[1].tolist() == list(range(18, 24))
        # A loop over it would start again.
        assert [next(iterator)[1].tolist()[0] for _ in range(4)] == [12, 18, 24, 30]
        with pytest.raises(StopIteration):
            next(iterator)
    assert next(iter(loader))[1].tolist() == list(range(6))
    assert next(iter(loader))[1].tolist() == list(range(6))
    loader.terminate()
    with pytest.raises(AssertionError):
        iter(loader)


class Named(torch.utils.data.Dataset):
    def __init__(self, value: Any) -> None:
        self.value = value

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return {"number": torch.tensor(index), "other": self.value}


def test_asynchronous_data_is_flat(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    keywords = {"batch_size": 2, "mode": poptorch.DataLoaderMode.Async}
    options = make_options(poptorch)
    loader = poptorch.DataLoader(options, Named(torch.ones(2)), **keywords)
    assert {key: tuple(tensor.shape) for key, tensor in next(iter(loader)).items()} == {
        "number": (6,),
        "other": (6, 2),
    }
    with pytest.raises(poptorch.Error, match="failed to start"):
        poptorch.DataLoader(options, Named([torch.ones(2)]), **keywords)
    with pytest.raises(Exception, match="pickle"):
        poptorch.DataLoader(options, Named(lambda: None), **keywords)


def test_asynchronous_loading_has_its_own_random_generator(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    mode, strategies = poptorch.DataLoaderMode.Async, poptorch.SharingStrategy

    def order(strategy: Any) -> List[List[int]]:
        torch.manual_seed(0)
        options = {"sharing_strategy": strategy}
        return batches(poptorch, numbers(60), shuffle=True, mode=mode, async_options=options)

    assert order(strategies.Fork) == order(strategies.Fork)
    assert order(strategies.ForkServer) != order(strategies.ForkServer)


class TwoByTwo:
    """A sampler of its own: pairs, last to first."""

    batch_size = 2

    def __iter__(self) -> Iterator[List[int]]:
        return iter([[number, number - 1] for number in range(29, 0, -2)])

    def __len__(self) -> int:
        return 15


@pytest.mark.parametrize("mode", ["Sync", "Async"])
def test_own_batch_sampler(fake: Tuple[Any, Any], mode: str) -> None:
    poptorch, _ = fake
    options = make_options(poptorch, 2, 3)
    loader = poptorch.DataLoader(
        options, numbers(30), batch_sampler=TwoByTwo(), mode=poptorch.DataLoaderMode[mode]
    )
    expected = [list(range(29, 17, -1)), list(range(17, 5, -1))]
    assert [batch[1].tolist() for batch in loader] == expected
    with pytest.raises(poptorch.Error, match="mutually exclusive"):
        poptorch.DataLoader(options, numbers(30), batch_size=2, batch_sampler=TwoByTwo())


def test_processes_share_a_dataset(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both

    def share(process: int, shuffle: bool) -> List[int]:
        options = make_options(poptorch).randomSeed(4)
        options.Distributed.configureProcessId(process, 2)
        given = batches(poptorch, numbers(25), options, shuffle=shuffle)
        return [number for batch in given for number in batch]

    assert share(0, False) + share(1, False) == list(range(24))
    parts = share(0, True), share(1, True)
    assert len(set(parts[0]) | set(parts[1])) == 24
    unseeded = make_options(poptorch)
    unseeded.Distributed.configureProcessId(0, 2)
    with pytest.raises(AssertionError, match="randomSeed"):
        poptorch.DataLoader(unseeded, numbers(24), shuffle=True)


# poprun.


def test_popdist(fake: Tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    poptorch, _ = fake
    import popdist

    assert not popdist.isPopdistEnvSet()
    monkeypatch.setenv("POPDIST_NUM_TOTAL_REPLICAS", "8")
    monkeypatch.setenv("POPDIST_NUM_LOCAL_REPLICAS", "2")
    monkeypatch.setenv("POPDIST_REPLICA_INDEX_OFFSET", "6")
    import popdist.poptorch

    assert popdist.isPopdistEnvSet()
    popdist.init()
    assert (popdist.getInstanceIndex(), popdist.getNumInstances()) == (3, 4)
    assert (popdist.getNumLocalReplicas(), popdist.getNumTotalReplicas()) == (2, 8)
    options = popdist.poptorch.Options(ipus_per_replica=2)
    assert isinstance(options, poptorch.Options)
    assert options.clone().replication_factor == 2
    assert (options.Distributed.processId, options.Distributed.numProcesses) == (3, 4)
    for name, call in (
        ("useIpuId", lambda: options.useIpuId(1)),
        ("replicationFactor", lambda: options.replicationFactor(1)),
        ("Distributed.disable", options.Distributed.disable),
        ("Distributed.setEnvVarNames", lambda: options.Distributed.setEnvVarNames("A", "B")),
        ("Distributed.configureProcessId", lambda: options.Distributed.configureProcessId(1)),
    ):
        with pytest.raises(RuntimeError, match=rf"Cannot call `{name}` with popdist\.poptorch"):
            call()
    executor = poptorch.inferenceModel(Net(poptorch), options.deviceIterations(2))
    assert executor(INPUTS).shape == (24, 3)
