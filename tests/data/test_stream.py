"""The stream of training batches does not depend on loader processes, cache or resuming."""

from __future__ import annotations

from typing import Callable, List

import pytest
import torch

from conftest import engine_of, module_of
from cxr_vit.config import Config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch, ChestXrayDataset
from cxr_vit.data.sampler import TrainingSampler

STEPS = 16  # of 10 of 48 images: three epochs, which begin and end within a batch
AUGMENT = (
    "augment.rotation=10",
    "augment.crop=0.7",
    "augment.gamma=0.2",
    "augment.horizontal_flip=0.5",
)


@pytest.fixture(params=["auto", "off"])
def config(request: pytest.FixtureRequest, make_config: Callable[..., Config]) -> Config:
    return make_config(*AUGMENT, f"data.cache={request.param}", "batch.device_iterations=2")


@pytest.fixture
def training(config: Config) -> ChestXrayDataset:
    module = ChestXrayDataModule(config)
    return module.dataset("train", augmented=True)


def stream(
    config: Config, training: ChestXrayDataset, *, num_workers: int = 0, start_step: int = 0
) -> List[Batch]:
    sampler = TrainingSampler(
        len(training),
        global_batch_size=10,
        device_iterations=2,
        seed=config.run.seed,
        start_step=start_step,
        total_steps=STEPS,
    )
    with engine_of(config, module_of(config)) as engine:
        engine.num_workers = num_workers
        return list(engine.loader(training, sampler, training=True))


def assert_same(one: List[Batch], two: List[Batch]) -> None:
    assert len(one) == len(two) > 0
    for left, right in zip(one, two):
        for first, second in zip(left, right):
            assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of two cores
@pytest.mark.parametrize("num_workers", [1, 4])
def test_any_number_of_workers_gives_the_same_stream(
    config: Config, training: ChestXrayDataset, num_workers: int
) -> None:
    assert 2 * len(training) < STEPS * 10
    assert_same(stream(config, training, num_workers=num_workers), stream(config, training))


def test_resuming_within_an_epoch_continues_the_same_stream(
    config: Config, training: ChestXrayDataset
) -> None:
    assert (6 * 10) % len(training) != 0
    assert_same(stream(config, training, start_step=6), stream(config, training)[3:])


def test_an_image_is_augmented_differently_in_the_next_epoch(
    config: Config, training: ChestXrayDataset
) -> None:
    size = len(training)
    first = training.__getitems__(range(size)).images
    assert (first != training.__getitems__(range(size, 2 * size)).images).flatten(1).any(1).all()
    assert torch.equal(first, training.__getitems__(range(size)).images)


def test_the_cache_and_the_files_give_the_same_stream(make_config: Callable[..., Config]) -> None:
    streams = []
    for cache in ("off", "auto"):
        config = make_config(*AUGMENT, f"data.cache={cache}", "batch.device_iterations=2")
        module = ChestXrayDataModule(config)
        streams.append(stream(config, module.dataset("train", augmented=True)))
    assert_same(*streams)


def test_evaluation_images_are_never_augmented(config: Config) -> None:
    module = ChestXrayDataModule(config)
    val = module.dataset("val")
    assert val.augmentation is None
    batch = val.__getitems__(range(len(val)))
    assert torch.equal(batch.images[:, 0], torch.from_numpy(val.read_images(range(len(val)))))
