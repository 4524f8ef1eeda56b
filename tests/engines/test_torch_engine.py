import numpy as np
import pytest
import torch
from conftest import engine_of as build

from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch
from cxr_vit.data.labels import FINDINGS
from cxr_vit.engines.base import EngineState
from cxr_vit.errors import CheckpointError, ConfigError, DataError
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.stages import StagedViT

needs_scaler = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="this torch has no fp16 on a CPU"
)


def engine_of(config):
    model = StagedViT.from_config(config, names=FINDINGS, prevalence=np.full(14, 0.1))
    return build(config, model)


def random_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randint(0, 256, (size, 1, 32, 32), dtype=torch.uint8, generator=generator),
        (torch.rand(size, 14, generator=generator) < 0.2).float(),
        torch.arange(size),
    )


def train(engine, steps=3, lr=1e-3):
    size = engine.batch.host_batch_size
    return torch.cat([engine.train_step(random_batch(size, k), lr=lr).losses for k in range(steps)])


def test_loss_is_the_mean_over_every_micro_batch(make_config):
    engine = engine_of(make_config())
    batch = random_batch(8)
    expected = multi_label_loss(engine.predict(batch), batch.labels)
    output = engine.train_step(batch, lr=1e-3)
    assert output.num_samples == 8
    assert float(output.losses[0]) == pytest.approx(float(expected), rel=1e-5)


def test_device_iterations_are_separate_updates(make_config):
    together = engine_of(make_config("batch.device_iterations=3", "train.steps=6"))
    apart = engine_of(make_config())
    batch = random_batch(24)
    losses = together.train_step(batch, lr=1e-3).losses
    parts = [Batch(*(part[k * 8 : k * 8 + 8] for part in batch)) for k in range(3)]
    assert torch.equal(
        losses, torch.cat([apart.train_step(part, lr=1e-3).losses for part in parts])
    )


def test_learning_rate_zero_changes_nothing(make_config):
    engine = engine_of(make_config("optim.weight_decay=0.1"))
    before = engine.state_dict().weights
    engine.train_step(random_batch(8), lr=0.0)
    after = engine.state_dict().weights
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradient_norm_is_that_before_clipping(make_config):
    free, clipped = (
        engine_of(make_config("model.head_bias=zero", *more))
        for more in ([], ["optim.max_grad_norm=0.01"])
    )
    batch = random_batch(8)
    norms = [engine.train_step(batch, lr=1e-3).grad_norm for engine in (free, clipped)]
    assert float(norms[0]) > 0.01
    assert torch.equal(*norms)


def test_clipping_scales_the_gradient_the_optimizer_sees(make_config):
    free, clipped = (
        engine_of(make_config("model.head_bias=zero", *more))
        for more in ([], ["optim.max_grad_norm=0.01"])
    )
    batch = random_batch(8)
    norm = float(free.train_step(batch, lr=1e-3).grad_norm)
    clipped.train_step(batch, lr=1e-3)
    name = "classifier.weight"
    moments = [engine.state_dict().optimizer[name]["exp_avg"] for engine in (free, clipped)]
    assert torch.allclose(moments[0] * (0.01 / norm), moments[1], rtol=1e-3)


def test_compile_changes_no_weight_and_leaves_no_gradient(make_config):
    engine = engine_of(make_config())
    before = engine.state_dict().weights
    seconds = engine.compile(random_batch(8))
    assert seconds > 0
    assert all(
        torch.equal(before[name], value) for name, value in engine.state_dict().weights.items()
    )
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_prediction_does_not_depend_on_the_micro_batch(make_config):
    whole = engine_of(make_config("batch.eval_micro_batch_size=12"))
    parts = engine_of(make_config("batch.eval_micro_batch_size=3"))
    batch = random_batch(12)
    assert torch.allclose(whole.predict(batch), parts.predict(batch), atol=1e-5)


@pytest.mark.parametrize(("micro", "iterations"), [(1, 1), (5, 1), (4, 3), (64, 1)])
def test_every_image_is_scored_once_in_order(make_config, micro, iterations):
    config = make_config(
        f"batch.eval_micro_batch_size={micro}", f"batch.eval_device_iterations={iterations}"
    )
    engine = engine_of(config)
    dataset = ChestXrayDataModule(config.data).dataset("test")
    logits, labels = engine.predict_dataset(dataset)
    assert torch.equal(labels, torch.from_numpy(dataset.records.labels).float())
    images = torch.stack([dataset[row].image for row in range(len(dataset))])
    expected = engine_of(make_config(f"batch.eval_micro_batch_size={len(dataset)}")).predict(
        Batch(images, labels, torch.arange(len(dataset)))
    )
    assert torch.allclose(logits, expected, atol=1e-5)


def test_prediction_has_no_dropout(make_config):
    engine = engine_of(make_config("model.dropout=0.5"))
    batch = random_batch(8)
    engine.train_step(batch, lr=1e-3)
    assert torch.equal(engine.predict(batch), engine.predict(batch))


def test_dropout_is_a_function_of_the_update(make_config):
    config = make_config("model.dropout=0.3", "model.head_bias=zero")
    straight = train(engine_of(config))
    disturbed = engine_of(config)
    losses = []
    for k in range(3):
        torch.rand(k + 1)  # as somebody else drawing numbers between the steps
        losses.append(disturbed.train_step(random_batch(8, k), lr=1e-3).losses)
    assert torch.equal(torch.cat(losses), straight)
    assert not torch.equal(straight, train(engine_of(make_config("model.head_bias=zero"))))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_scaler)])
def test_half_precision_follows_fp32(make_config, precision):
    exact = train(engine_of(make_config()), steps=5)
    half = train(engine_of(make_config(f"engine.precision={precision}")), steps=5)
    assert torch.allclose(half, exact, rtol=2e-2)
    assert not torch.equal(half, exact)


@needs_scaler
def test_fp16_keeps_its_loss_scale_in_the_state(make_config):
    config = make_config("engine.precision=fp16")
    engine = engine_of(config)
    train(engine)
    engine.scaler.update(1024.0)
    other = engine_of(config)
    other.load_state_dict(engine.state_dict())
    assert other.scaler.get_scale() == 1024.0


def test_state_of_an_engine_goes_on_in_another_bit_for_bit(make_config):
    config = make_config("model.dropout=0.1", "optim.weight_decay=0.1")
    straight = train(engine_of(config), steps=4)
    first = engine_of(config)
    train(first, steps=2)
    second = engine_of(config)
    second.load_state_dict(first.state_dict())
    losses = [second.train_step(random_batch(8, k), lr=1e-3).losses for k in (2, 3)]
    assert torch.equal(torch.cat(losses), straight[2:])


def test_state_is_a_copy(make_config):
    engine = engine_of(make_config())
    train(engine, steps=1)
    state = engine.state_dict()
    kept = state.optimizer["classifier.bias"]["exp_avg"].clone()
    train(engine, steps=1)
    assert torch.equal(state.optimizer["classifier.bias"]["exp_avg"], kept)


def test_state_of_another_optimizer_is_refused(make_config):
    engine = engine_of(make_config())
    state = engine.state_dict()
    state.optimizer_kind = "poptorch.LAMB"
    with pytest.raises(CheckpointError, match=r"poptorch\.LAMB.*torch\.AdamW"):
        engine.load_state_dict(state)


def test_weights_alone_start_the_optimizer_anew(make_config):
    engine = engine_of(make_config())
    train(engine, steps=2)
    state = engine.state_dict()
    engine.load_state_dict(EngineState(state.weights))
    assert engine.state_dict().optimizer == {}
    train(engine, steps=1)
    step = engine.state_dict().optimizer["classifier.bias"]["step"]
    assert step == 1


def test_sgd_with_momentum_goes_on_bit_for_bit(make_config):
    config = make_config("optim.name=sgd", "optim.momentum=0.8")
    straight = train(engine_of(config), steps=4)
    first, second = engine_of(config), engine_of(config)
    train(first, steps=2)
    state = first.state_dict()
    assert state.optimizer_kind == "torch.SGD"
    second.load_state_dict(state)
    losses = [second.train_step(random_batch(8, k), lr=1e-3).losses for k in (2, 3)]
    assert torch.equal(torch.cat(losses), straight[2:])


def test_lamb_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"optim\.name=lamb exists only in PopTorch"):
        engine_of(make_config("optim.name=lamb"))


def test_optimizer_state_has_hub_names(make_config):
    engine = engine_of(make_config())
    train(engine, steps=1)
    slots = engine.state_dict().optimizer["vit.encoder.layer.0.attention.attention.query.weight"]
    assert set(slots) == {"exp_avg", "exp_avg_sq", "step"}


def test_memory_is_reported_in_gib(make_config):
    (value,) = engine_of(make_config()).device_stats().values()
    assert 0.05 < value < 64


def test_description_says_what_why_and_how_to_choose(make_config):
    text = engine_of(make_config()).describe()
    for part in ("torch engine", "CPU", "fp32", "engine.device=cpu", "engine.precision=fp32|bf16"):
        assert part in text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_in_one_line_from_any_process(make_config, tmp_path, workers):
    config = make_config(f"data.num_workers={workers}", "data.cache=off")
    dataset = ChestXrayDataModule(config.data).dataset("test")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>not found</html>")
    dataset._images._paths[3] = str(broken)
    with pytest.raises(DataError, match=r"broken\.png") as caught:
        engine_of(config).predict_dataset(dataset)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)
