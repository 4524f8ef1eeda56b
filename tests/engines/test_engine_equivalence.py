"""The torch engine against a plain loop of transformers and torch, and against itself."""

import pytest
import torch
from torch.nn import functional as F

from conftest import SMALL, engine_of, module_of
from cxr_vit.config import load_config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.model.schedule import LearningRate
from plain_loop import (
    RECIPES,
    UNKNOWN,
    Result,
    assert_same_result,
    host_batches,
    masked_loss,
    plain_loop,
    write_unknown,
)


def run(config):
    """Make the updates on the engine; return the losses and the final weights."""
    result, weights = measure(config)
    return result.losses, weights


def measure(config):
    data = ChestXrayDataModule(config)
    module = module_of(config, data)
    rate = LearningRate.from_config(config, config.train.steps)
    losses, norms, step = [], [], 0
    with engine_of(config, module) as engine:
        for batch in engine.loader(
            data.dataset("train"), host_batches(config, data), training=True
        ):
            output = engine.train_step(batch, lr=rate.at(step))
            losses.append(output.losses)
            norms.append(output.grad_norm)
            step += len(output.losses)
        state = engine.state_dict()
    gradients = {name: slots["exp_avg"] for name, slots in state.optimizer.items()}
    return Result(torch.cat(losses), gradients, torch.cat(norms)), state.weights


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
    expected = plain_loop(config, F.binary_cross_entropy_with_logits).losses
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_stages_do_not_change_the_losses_of_a_recipe(make_config, recipe):
    (expected, weights), (losses, others) = (
        run(make_config(*BASE, *recipe, "train.steps=3", f"pipeline.layers_per_stage={cut}"))
        for cut in ("[4]", "[0, 1, 3]")
    )
    assert torch.equal(losses, expected)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


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


# Unknown labels


MASKED = (*BASE, *UNKNOWN, "train.steps=4", "optim.max_grad_norm=0.2")


@pytest.fixture(scope="module")
def masked(sample_root, tmp_path_factory):
    """Overrides, and the result of a loop over the known labels."""
    table = tmp_path_factory.mktemp("data") / "unknown.csv"
    write_unknown(sample_root, table)
    overrides = (*MASKED, f"data.csv={table}")
    config = load_config([], [*SMALL, f"data.root={sample_root}", *overrides])
    return overrides, plain_loop(config, masked_loss)


@pytest.mark.parametrize(
    "setting",
    [
        "batch={micro_batch_size: 8, gradient_accumulation: 1}",
        "batch={micro_batch_size: 1, gradient_accumulation: 8}",
        "batch={micro_batch_size: 2, gradient_accumulation: 2, replicas: 2}",
        "pipeline.layers_per_stage=[0, 1, 3]",
    ],
)
def test_unknown_labels_are_left_out_of_losses_and_gradients(make_config, masked, setting):
    overrides, expected = masked
    assert_same_result(measure(make_config(*overrides, setting))[0], expected)


def test_enough_labels_are_unknown_to_compare(make_config, masked):
    """Otherwise the test above could not detect a wrong divisor, or gradients that are clipped."""
    overrides, expected = masked
    assert 0.3 < (ChestXrayDataModule(make_config(*overrides)).records.labels == -1).mean() < 0.5
    assert expected.norms.min() > 0.2
