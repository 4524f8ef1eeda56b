import copy

import numpy as np
import pytest
import torch

from conftest import engine_of, module_of
from cxr_vit.config.plans import BatchPlan, StagePlan
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.engines.ipu.graphs import graph_shape
from cxr_vit.model.drop_path import _STEP, DropPath, _mix, uniform
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import VitParts, layer_output, take_factors
from families import FAMILIES, images, make
from plain_loop import host_batches

ROWS = torch.arange(4000)


def numbers(seed=0, update=0, rows=4000, branches=24):
    return uniform(seed, np.full(rows, update), np.arange(rows), branches)


def test_numbers_are_uniform_and_independent():
    drawn = numbers()
    assert drawn.shape == (4000, 24) and drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=64, range=(0, 1))[0]
    expected = drawn.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # chi-square, 63 degrees of freedom
    others = [numbers(seed=1), numbers(update=1), np.roll(drawn, 1, axis=0), np.roll(drawn, 1, 1)]
    for other in others:
        assert abs(np.corrcoef(drawn.ravel(), other.ravel())[0, 1]) < 0.015


def test_numbers_are_those_of_splitmix64():
    """The first two outputs of Vigna's splitmix64.c, compiled, for the seeds 0 and 1234567."""
    states = np.array([0, 1234567], dtype=np.uint64)
    expected = [
        [0xE220A8397B1DCDAF, 6457827717110365317],
        [0x6E789E6AA1B965F4, 3203168211198807973],
    ]
    assert [_mix(states).tolist(), _mix(states + _STEP).tolist()] == expected


def test_rates_rise_linearly_and_the_expected_factor_is_1():
    factors = DropPath(0.3, 4, seed=7).factors(3, ROWS, 4000)
    assert factors.shape == (4000, 8) and factors.dtype == torch.float32
    skipped = (factors == 0).float().mean(0).tolist()
    assert skipped == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3], abs=0.025)
    assert factors.mean(0).tolist() == pytest.approx([1.0] * 8, abs=0.04)
    kept = [column[column > 0].unique().tolist() for column in factors.unbind(1)]
    once = [[1.0], [1 / 0.9], [1 / 0.8], [1 / 0.7]]
    assert kept == [pytest.approx(value) for value in once for _ in range(2)]
    assert not torch.equal(factors[:, 6], factors[:, 7]), "attention and MLP are drawn apart"


def test_factors_are_a_function_of_update_and_row_alone():
    draws = DropPath(0.5, 2, seed=0)
    rows = torch.tensor([5, 3, 5, 9])
    four = draws.factors(10, rows, per_update=2)
    assert torch.equal(four[:2], draws.factors(10, torch.tensor([5, 3]), 2))
    assert torch.equal(four[2:], draws.factors(11, torch.tensor([5, 9]), 2))
    assert torch.equal(four[3:], draws.factors(11, torch.tensor([9]), 1))
    many = [draws.factors(update, ROWS[:100], 100) for update in (0, 1)]
    assert not torch.equal(*many)
    assert not torch.equal(many[0], DropPath(0.5, 2, seed=1).factors(0, ROWS[:100], 100))
    assert DropPath(0.0, 2, seed=0).factors(0, rows, 4) is None


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_factor_scales_what_its_branch_adds(kind):
    _, plain = VitParts(make(kind)).layers[1]
    layer = take_factors(copy.deepcopy(plain))
    torch.manual_seed(0)
    hidden = torch.randn(3, 17, 24)

    def output(value, attention, mlp):
        with torch.no_grad():
            return layer_output(layer(value, factors=torch.tensor([attention, mlp]).T))

    off, on = [0.0] * 3, [1.0] * 3
    with torch.no_grad():
        assert torch.equal(output(hidden, on, on), layer_output(plain(hidden)))
    assert torch.equal(output(hidden, off, off), hidden)
    first, second = [0.0, 1.0, 2.5], [1.0, 0.0, 4.0]
    attended = hidden + torch.tensor(first)[:, None, None] * (output(hidden, on, off) - hidden)
    mlp = output(attended, off, on) - attended
    assert mlp.abs().mean() > 0.1
    expected = attended + torch.tensor(second)[:, None, None] * mlp
    assert torch.allclose(output(hidden, first, second), expected, atol=1e-4)


@pytest.mark.parametrize("cut", [[1, 1], [0, 2, 0]])
def test_every_cut_computes_the_same(cut):
    model, paths = make("vit"), DropPath(0.9, 2, seed=0).factors(0, torch.arange(3), 3)
    assert (paths == 0).any()
    whole, parts = (
        StagedViT(model, StagePlan.from_list(layers), mean=0.5, std=0.5) for layers in ([2], cut)
    )
    with torch.no_grad():
        expected = whole(images(32), paths)
        assert torch.equal(parts(images(32), paths), expected)
        assert not torch.equal(parts(images(32)), expected)


def train(config, steps=4, start=None):
    """Make updates; return their losses and the engine's state."""
    data = ChestXrayDataModule(config)
    with engine_of(config, module_of(config, data)) as engine:
        if start is not None:
            engine.load_state_dict(start)
        sampler = host_batches(config, data)
        sampler.start_step, sampler.total_steps = engine.updates, engine.updates + steps
        batches = engine.loader(data.dataset("train"), sampler, training=True)
        losses = [engine.train_step(batch, lr=1e-3).losses for batch in batches]
        return torch.cat(losses), engine.state_dict()


ON = ("model.drop_path=0.5", "batch={micro_batch_size: 4, gradient_accumulation: 4}")


def test_micro_batches_replicas_and_device_iterations_make_the_same_draws(make_config):
    expected, _ = train(make_config(*ON), steps=2)
    for batch in (
        "{micro_batch_size: 2, gradient_accumulation: 4, replicas: 2}",
        "{micro_batch_size: 16, gradient_accumulation: 1, device_iterations: 2}",
    ):
        losses, _ = train(make_config(*ON, f"batch={batch}"), steps=2)
        assert torch.allclose(losses, expected, rtol=0, atol=1e-5), batch
    plain, _ = train(make_config(*ON, "model.drop_path=0"), steps=2)
    assert (plain - expected).abs().max() > 1e-3


def test_a_resumed_run_makes_the_same_draws(make_config):
    config = make_config(*ON)
    whole, end = train(config)
    first, state = train(config, steps=2)
    second, resumed = train(config, steps=2, start=state)
    assert torch.equal(torch.cat([first, second]), whole)
    assert all(torch.equal(resumed.weights[name], end.weights[name]) for name in end.weights)


def test_scores_use_every_branch(make_config):
    config = make_config("model.drop_path=0.9")
    data = ChestXrayDataModule(config)
    module = module_of(config, data)
    with engine_of(config, module) as engine:
        logits, _ = engine.predict_dataset(data.dataset("val"))
    plain = make_config("model.drop_path=0")
    with engine_of(plain, module_of(plain, data)) as engine:
        assert torch.equal(engine.predict_dataset(data.dataset("val"))[0], logits)


def test_a_rate_compiles_another_graph_than_none(make_config):
    """The rate itself is not in the graph: the factors are an input."""
    keys = []
    for rate in (0, 0.1, 0.2):
        config = make_config(f"model.drop_path={rate}")
        batch = BatchPlan.from_section(config.batch)
        keys.append(graph_shape(config, batch, module_of(config).model))
    assert keys[0] != keys[1] == keys[2]
