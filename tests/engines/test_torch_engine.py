import pytest
import torch
from torch import nn

from conftest import engine_of, module_of
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.base import EngineState
from cxr_vit.errors import CheckpointError, ConfigError
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.module import ViTModule

needs_scaler = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="this torch has no fp16 on a CPU"
)


@pytest.fixture
def make_engine(make_config):
    """Build the engine of a small configuration with more overrides."""

    def make(*overrides):
        config = make_config(*overrides)
        return engine_of(config, module_of(config))

    return make


def random_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randint(0, 256, (size, 1, 32, 32), dtype=torch.uint8, generator=generator),
        (torch.rand(size, 14, generator=generator) < 0.2).float(),
        torch.arange(size),
    )


def train(engine, steps=range(3)):
    """Train on one random batch per step; return the losses."""
    size = engine.batch.host_batch_size
    return torch.cat([engine.train_step(random_batch(size, k), lr=1e-3).losses for k in steps])


def test_loss_is_the_mean_over_all_micro_batches(make_engine):
    engine = make_engine()
    batch = random_batch(8)
    expected = multi_label_loss(engine.predict(batch), batch.labels)
    output = engine.train_step(batch, lr=1e-3)
    assert output.num_samples == 8
    assert float(output.losses[0]) == pytest.approx(float(expected), rel=1e-5)


def test_gradients_without_a_limit_are_those_under_a_high_one(make_engine):
    free, limited = make_engine(), make_engine("optim.max_grad_norm=1e30")
    assert torch.equal(train(free), train(limited))
    outputs = [engine.train_step(random_batch(8), lr=1e-3) for engine in (free, limited)]
    assert torch.equal(outputs[0].grad_norm, outputs[1].grad_norm)
    weights = limited.state_dict().weights
    assert all(torch.equal(weight, weights[name]) for name, weight in free.model.weights().items())


def test_device_iterations_are_separate_updates(make_engine):
    together = make_engine("batch.device_iterations=3", "train.steps=6")
    apart = make_engine()
    batch = random_batch(24)
    losses = together.train_step(batch, lr=1e-3).losses
    parts = [Batch(*(part[k * 8 : k * 8 + 8] for part in batch)) for k in range(3)]
    assert torch.equal(
        losses, torch.cat([apart.train_step(part, lr=1e-3).losses for part in parts])
    )


def test_learning_rate_zero_changes_nothing(make_engine):
    engine = make_engine("optim.weight_decay=0.1")
    before = engine.state_dict().weights
    engine.train_step(random_batch(8), lr=0.0)
    after = engine.state_dict().weights
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_clipping_scales_the_gradient_and_reports_the_norm_before(make_engine):
    free = make_engine("model.head_bias=zero")
    clipped = make_engine("model.head_bias=zero", "optim.max_grad_norm=0.01")
    batch = random_batch(8)
    norms = [engine.train_step(batch, lr=1e-3).grad_norm for engine in (free, clipped)]
    assert float(norms[0]) > 0.01
    assert torch.equal(*norms)
    name = "classifier.weight"
    moments = [engine.state_dict().optimizer[name]["exp_avg"] for engine in (free, clipped)]
    assert torch.allclose(moments[0] * (0.01 / float(norms[0])), moments[1], rtol=1e-3)


def test_one_process_on_a_cpu_makes_no_pass_before_the_first_step(make_engine, monkeypatch):
    engine = make_engine()
    passes = []
    monkeypatch.setattr(engine.model, "forward", lambda *values: passes.append(values))
    assert engine.compile(random_batch(8)) == 0 and not passes
    with pytest.raises(AssertionError, match="5 samples"):
        engine.compile(random_batch(5))


def test_compile_changes_no_weight_and_leaves_no_gradient(make_engine, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine.group, "is_connected", True)
    before = engine.state_dict().weights
    seconds = engine.compile(random_batch(8))
    assert seconds > 0
    assert all(
        torch.equal(before[name], value) for name, value in engine.state_dict().weights.items()
    )
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_prediction_does_not_depend_on_the_micro_batch(make_engine):
    whole = make_engine("batch.eval_micro_batch_size=12")
    parts = make_engine("batch.eval_micro_batch_size=3")
    batch = random_batch(12)
    assert torch.allclose(whole.predict(batch), parts.predict(batch), atol=1e-5)


@pytest.mark.parametrize(("micro", "iterations"), [(1, 1), (5, 1), (4, 3), (64, 1)])
def test_predict_dataset_scores_each_image_once_in_order(
    make_config, make_engine, micro, iterations
):
    overrides = (
        f"batch.eval_micro_batch_size={micro}",
        f"batch.eval_device_iterations={iterations}",
    )
    dataset = ChestXrayDataModule(make_config(*overrides)).dataset("test")
    logits, labels = make_engine(*overrides).predict_dataset(dataset)
    assert torch.equal(labels, torch.from_numpy(dataset.records.labels).float())
    images = torch.stack([dataset[row].image for row in range(len(dataset))])
    expected = make_engine(f"batch.eval_micro_batch_size={len(dataset)}").predict(
        Batch(images, labels, torch.arange(len(dataset)))
    )
    assert torch.allclose(logits, expected, atol=1e-5)


def test_prediction_has_no_dropout(make_engine):
    engine = make_engine("model.dropout=0.5")
    batch = random_batch(8)
    engine.train_step(batch, lr=1e-3)
    assert torch.equal(engine.predict(batch), engine.predict(batch))


def test_dropout_is_a_function_of_the_update(make_engine):
    overrides = ("model.dropout=0.3", "model.head_bias=zero")
    expected = train(make_engine(*overrides))
    disturbed = make_engine(*overrides)
    losses = []
    for k in range(3):
        torch.rand(k + 1)  # other code draws random numbers between the steps
        losses.append(train(disturbed, [k]))
    assert torch.equal(torch.cat(losses), expected)
    assert not torch.equal(expected, train(make_engine("model.head_bias=zero")))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_scaler)])
def test_half_precision_is_close_to_fp32(make_engine, precision):
    exact = train(make_engine(), range(5))
    half = train(make_engine(f"engine.precision={precision}"), range(5))
    assert torch.allclose(half, exact, rtol=2e-2)
    assert not torch.equal(half, exact)


@needs_scaler
def test_fp16_stores_its_loss_scale_in_the_state(make_engine):
    engine, other = make_engine("engine.precision=fp16"), make_engine("engine.precision=fp16")
    train(engine)
    engine.scaler.update(1024.0)
    other.load_state_dict(engine.state_dict())
    assert other.scaler.get_scale() == 1024.0


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("torch.AdamW", ["model.dropout=0.1", "optim.weight_decay=0.1"]),
        ("torch.SGD", ["optim.name=sgd", "optim.momentum=0.8"]),
    ],
)
def test_loaded_state_continues_bit_for_bit(make_engine, kind, overrides):
    expected = train(make_engine(*overrides), range(4))
    first, second = make_engine(*overrides), make_engine(*overrides)
    train(first, range(2))
    state = first.state_dict()
    assert state.optimizer_kind == kind
    second.load_state_dict(state)
    assert torch.equal(train(second, [2, 3]), expected[2:])


def test_state_fits_weights_in_another_memory_format(make_engine):
    """As a callback sets it; the tensors of a checkpoint are contiguous."""
    engines = [make_engine(), make_engine()]
    for engine in engines:
        engine.model.to(memory_format=torch.channels_last)
    first, second = engines
    train(first, range(2))
    state = first.state_dict()
    for slots in state.optimizer.values():
        slots.update({slot: value.contiguous() for slot, value in slots.items()})
    second.load_state_dict(state)
    assert torch.equal(train(second, [2, 3]), train(first, [2, 3]))


def test_ranges_of_stages_are_of_what_is_computed(make_engine):
    """The tokens that the last layer leaves out are zeros in the output of its stage."""
    engine = make_engine("pipeline.layers_per_stage=[2, 2, 0]")
    weights = dict(engine.model.hub_parameters())
    with torch.no_grad():
        weights["vit.encoder.layer.3.output.dense.bias"].fill_(100)
    found = engine.activation_ranges(random_batch(5).images)
    assert found[0].smallest < 0 and found[1].smallest > 50


def test_state_is_a_copy(make_engine):
    engine = make_engine()
    train(engine, [0])
    state = engine.state_dict()
    kept = state.optimizer["classifier.bias"]["exp_avg"].clone()
    train(engine, [0])
    assert torch.equal(state.optimizer["classifier.bias"]["exp_avg"], kept)


def test_state_of_another_optimizer_is_refused(make_engine):
    engine = make_engine()
    state = engine.state_dict()
    state.optimizer_kind = "poptorch.LAMB"
    with pytest.raises(CheckpointError, match=r"poptorch\.LAMB.*torch\.AdamW"):
        engine.load_state_dict(state)


def test_state_without_a_parameter_is_refused(make_engine):
    engine = make_engine()
    train(engine, [0])
    state = engine.state_dict()
    del state.optimizer["classifier.bias"]
    with pytest.raises(CheckpointError, match=r"of classifier\.bias, which .*weights_only=true"):
        engine.load_state_dict(state)


class Unused(ViTModule):
    """Has a layer in its head that is not used."""

    def configure_model(self):
        model = super().configure_model()
        model.classifier.unused = nn.Linear(2, 2)
        return model


def test_parameter_without_a_gradient_is_no_reason_to_refuse_a_state(make_config):
    losses = []
    for resumed in (False, True):
        config = make_config()
        engines = []
        for _ in range(2):
            module = Unused(config)
            module.setup()
            engines.append(engine_of(config, module))
        train(engines[0], range(2))
        state = engines[0].state_dict()
        assert "unused" in " ".join(state.optimizer)
        if resumed:
            engines[1].load_state_dict(state)
        losses.append(train(engines[resumed], [2]))
        again = engines[resumed].state_dict()
        assert again.optimizer.keys() == state.optimizer.keys()
    assert torch.equal(*losses)


class Adagrad(ViTModule):
    """Has an optimizer whose constructor makes its state."""

    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameter_groups(), lr=0.1, initial_accumulator_value=0.5)


def test_state_of_the_constructor_is_kept_where_the_checkpoint_has_none(make_config):
    config = make_config("optim.lr=0.1")
    module = Adagrad(config)
    module.setup()
    engine = engine_of(config, module)
    weights = engine.state_dict().weights
    first = train(engine, range(2))
    engine.load_state_dict(EngineState(weights))
    slots = engine.state_dict().optimizer["classifier.bias"]
    assert torch.equal(slots["sum"], torch.full((14,), 0.5))
    assert torch.equal(train(engine, range(2)), first)


def test_weights_alone_reset_the_optimizer(make_engine):
    engine = make_engine()
    train(engine, range(2))
    engine.load_state_dict(EngineState(engine.state_dict().weights))
    assert engine.state_dict().optimizer == {}
    train(engine, [0])
    assert engine.state_dict().optimizer["classifier.bias"]["step"] == 1


def test_lamb_is_refused(make_engine):
    with pytest.raises(ConfigError, match=r"optim\.name=lamb exists only in PopTorch"):
        make_engine("optim.name=lamb")


def test_optimizer_state_has_hub_names(make_engine):
    engine = make_engine()
    train(engine, [0])
    slots = engine.state_dict().optimizer["vit.encoder.layer.0.attention.attention.query.weight"]
    assert set(slots) == {"exp_avg", "exp_avg_sq", "step"}


def test_memory_is_reported_in_gib(make_engine):
    (value,) = make_engine().device_stats().values()
    assert 0.05 < value < 64


def test_description_and_facts_agree(make_engine):
    engine = make_engine("batch.replicas=2")
    text = engine.describe()
    for part in ("torch engine", "CPU", "fp32", "engine.device=cpu", "engine.precision=fp32|bf16"):
        assert part in text
    assert engine.facts() == {
        "name": "torch",
        "device": "CPU",
        "precision": "fp32",
        "processes": 1,
        "replicas": 2,
        "stages": 1,
    }
