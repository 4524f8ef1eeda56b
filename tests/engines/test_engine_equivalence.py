"""The torch engine against a plain loop of transformers and torch, and against itself."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from conftest import engine_of, module_of
from cxr_vit.config import BatchPlan
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.sampler import TrainingSampler
from cxr_vit.model.schedule import LearningRate
from cxr_vit.model.vit import hub_name

STEPS = 20


def host_batches(config, data):
    batch = BatchPlan.from_section(config.batch)
    return TrainingSampler(
        len(data.splits.train),
        global_batch_size=batch.global_batch_size,
        device_iterations=batch.device_iterations,
        seed=config.run.seed,
        start_step=0,
        total_steps=STEPS,
    )


def run(config):
    """Make 20 updates on the engine; return the losses and the final weights."""
    data = ChestXrayDataModule(config)
    module = module_of(config, data)
    rate = LearningRate.from_section(config.schedule, peak=config.optim.lr, total_steps=STEPS)
    losses, step = [], 0
    with engine_of(config, module) as engine:
        for batch in engine.loader(
            data.dataset("train"), host_batches(config, data), training=True
        ):
            output = engine.train_step(batch, lr=rate.at(step))
            losses.append(output.losses)
            step += len(output.losses)
        return torch.cat(losses), engine.state_dict().weights


def plain_loop(config):
    """Make the same updates with transformers and torch only, and Hugging Face's loss."""
    data = ChestXrayDataModule(config)
    start = module_of(config, data).model
    model = ViTForImageClassification(ViTConfig(**start.config.to_dict()))
    weights = start.weights()
    model.load_state_dict({name: weights[hub_name(name)] for name in model.state_dict()})
    model.train()
    no_decay = [
        p for n, p in model.named_parameters() if p.dim() < 2 or "token" in n or "position" in n
    ]
    kept = {id(parameter) for parameter in no_decay}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if id(p) not in kept]},
            {"params": no_decay, "weight_decay": 0.0},
        ],
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
    )
    schedule = LearningRate.from_section(config.schedule, peak=config.optim.lr, total_steps=STEPS)
    dataset, losses = data.dataset("train"), []
    for step, rows in enumerate(host_batches(config, data)):
        samples = [dataset[row] for row in rows]
        pixels = torch.stack([sample.image for sample in samples]).float() / 255
        pixels = ((pixels - 0.5) / 0.5).repeat(1, 3, 1, 1)
        labels = torch.stack([sample.labels for sample in samples])
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.zero_grad()
        loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


BASE = ("schedule.warmup_ratio=0.25", "optim.lr=1e-3", "optim.weight_decay=0.05", "train.steps=20")


@pytest.mark.parametrize("bias", ["prior", "zero"])
def test_losses_match_a_plain_transformers_loop(make_config, bias):
    config = make_config(
        *BASE,
        f"model.head_bias={bias}",
        "batch.micro_batch_size=8",
        "batch.gradient_accumulation=1",
    )
    losses, _ = run(config)
    expected = plain_loop(config)
    assert torch.allclose(losses, expected, rtol=0, atol=1e-6), (losses - expected).abs().max()
    assert losses[-1] < losses[0]


def test_same_seed_repeats_losses_and_weights(make_config):
    config = make_config(*BASE, "model.dropout=0.1")
    first, second = run(config), run(config)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_another_seed_changes_the_losses(make_config):
    losses, _ = run(make_config(*BASE))
    other, _ = run(make_config(*BASE, "run.seed=1"))
    assert not torch.equal(losses, other)


def test_micro_batches_of_1_and_4_give_the_same_losses(make_config):
    one, _ = run(make_config(*BASE, "batch.micro_batch_size=1", "batch.gradient_accumulation=16"))
    four, _ = run(make_config(*BASE, "batch.micro_batch_size=4", "batch.gradient_accumulation=4"))
    assert torch.allclose(one, four, rtol=0, atol=1e-5), (one - four).abs().max()


@pytest.mark.parametrize("cut", ["[4]", "[2, 2]", "[0, 1, 3]"])
def test_stages_do_not_change_the_losses(make_config, cut):
    expected, _ = run(make_config(*BASE))
    losses, _ = run(make_config(*BASE, f"pipeline.layers_per_stage={cut}"))
    assert torch.equal(losses, expected)


def test_loader_workers_do_not_change_the_losses(make_config):
    expected, _ = run(make_config(*BASE))
    losses, _ = run(make_config(*BASE, "data.num_workers=2"))
    assert torch.equal(losses, expected)


def test_device_iterations_do_not_change_the_losses_at_a_constant_rate(make_config):
    constant = (*BASE, "schedule.name=constant", "schedule.warmup_ratio=0")
    expected, _ = run(make_config(*constant))
    losses, _ = run(make_config(*constant, "batch.device_iterations=5"))
    assert torch.equal(losses, expected)


@pytest.mark.parametrize(("replicas", "accumulation"), [(2, 2), (4, 1)])
def test_replicas_of_one_process_equal_more_accumulation(make_config, replicas, accumulation):
    expected, _ = run(make_config(*BASE, "batch.gradient_accumulation=4"))
    batch = [f"batch.replicas={replicas}", f"batch.gradient_accumulation={accumulation}"]
    losses, _ = run(make_config(*BASE, *batch))
    assert torch.equal(losses, expected)
