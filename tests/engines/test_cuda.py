"""The torch engine on a GPU, where there is one."""

import pytest
import torch

from conftest import engine_of, module_of
from cxr_vit.data.dataset import Batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ON_GPU = ["engine.device=cuda", "engine.name=torch"]


def batch_of(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 1, 32, 32), dtype=torch.uint8, generator=generator)
    labels = (torch.rand(size, 14, generator=generator) < 0.2).float()
    return Batch(images.pin_memory(), labels.pin_memory(), torch.arange(size))


def losses_of(config, steps=6):
    engine = engine_of(config, module_of(config))
    outputs = [engine.train_step(batch_of(8, step), lr=1e-3) for step in range(steps)]
    return torch.cat([output.losses for output in outputs]), engine


def test_losses_are_those_of_the_cpu_and_repeat(make_config):
    expected, _ = losses_of(make_config())
    config = make_config(*ON_GPU)
    losses, engine = losses_of(config)
    again, _ = losses_of(config)
    assert torch.allclose(losses, expected, atol=1e-4)
    assert torch.equal(losses, again)
    assert all(group["fused"] for group in engine.optimizer.param_groups)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait_for_the_gpu(make_config, precision):
    overrides = [f"engine.precision={precision}", "optim.max_grad_norm=1.0", "model.drop_path=0.3"]
    config = make_config(*ON_GPU, *overrides)
    engine = engine_of(config, module_of(config))
    engine.train_step(batch_of(8), lr=1e-3).wait()  # allocates
    batch = batch_of(8, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = engine.train_step(batch, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not output.is_read
    assert output.losses.isfinite().all()
    assert output.losses.device.type == "cpu"


def test_state_of_either_device_continues_on_the_other(make_config):
    _, on_cpu = losses_of(make_config(), 2)
    _, on_gpu = losses_of(make_config(*ON_GPU), 2)
    for first, second in ((on_cpu, on_gpu), (on_gpu, on_cpu)):
        second.load_state_dict(first.state_dict())
        one, other = (engine.train_step(batch_of(8, 9), lr=1e-3) for engine in (first, second))
        assert torch.allclose(one.losses, other.losses, atol=1e-4)
        ours, theirs = (engine.state_dict().optimizer for engine in (first, second))
        assert {name: float(slots["step"]) for name, slots in ours.items()} == {
            name: float(slots["step"]) for name, slots in theirs.items()
        }
