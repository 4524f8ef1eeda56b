"""PopTorch's loader: order of the rows, padding, termination."""

from __future__ import annotations

import multiprocessing
import re
import time

import pytest
import torch

from cxr_vit.config import BatchPlan
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch
from cxr_vit.data.images import FileReader
from cxr_vit.data.sampler import PADDING, EvaluationSampler, ReplicaSampler, TrainingSampler
from cxr_vit.engines.ipu.engine import PopTorchEngine
from cxr_vit.engines.ipu.loader import RowSampler
from cxr_vit.errors import ConfigError, DataError

from .commands import make_engine

SHAPE = (
    "batch.micro_batch_size=2",
    "batch.device_iterations=2",
    "batch.replicas=2",
    "batch.eval_micro_batch_size=3",
)
STEPS = 6


def sampler_of(config, data, *, start=0, steps=STEPS):
    batch = BatchPlan.from_section(config.batch)
    return TrainingSampler(
        len(data.splits.train),
        global_batch_size=batch.global_batch_size,
        device_iterations=batch.device_iterations,
        seed=config.run.seed,
        start_step=start,
        total_steps=steps,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["sync", "async", "async_rebatched"])
def test_batches_follow_the_sampler_in_every_mode(ipu, commands, mode, workers):
    """Eight batches are kept: an asynchronous loader has three buffers, which it refills."""
    config = commands.config(*SHAPE, f"engine.loader_mode={mode}", f"data.num_workers={workers}")
    data = ChestXrayDataModule(config)
    dataset = data.dataset("train")
    size = len(dataset)
    expected = [[draw % size for draw in draws] for draws in sampler_of(config, data, steps=16)]
    with make_engine(config) as engine:
        batches = []
        for batch in engine.loader(dataset, sampler_of(config, data, steps=16), training=True):
            assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.float32)
            images = torch.from_numpy(dataset.read_images(batch.indices.numpy()))
            assert torch.equal(batch.images[:, 0], images), "the images are those of the rows"
            batches.append(batch)
        assert [batch.indices.tolist() for batch in batches] == expected
        labels = torch.stack([dataset[row].labels for rows in expected for row in rows])
        assert torch.equal(torch.cat([batch.labels for batch in batches]), labels)


def test_resumed_loader_continues_the_order(ipu, commands):
    config = commands.config(*SHAPE)
    data = ChestXrayDataModule(config)
    with make_engine(config) as engine:
        rows = [
            [
                batch.indices.tolist()
                for batch in engine.loader(
                    data.dataset("train"), sampler_of(config, data, start=start), training=True
                )
            ]
            for start in (0, 4)
        ]
    assert rows[1] == rows[0][2:]
    assert len(rows[1]) == 1


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_evaluation_is_padded_and_scores_every_image_once(ipu, commands, mode):
    config = commands.config(*SHAPE, f"engine.loader_mode={mode}")
    dataset = ChestXrayDataModule(config).dataset("test")
    with make_engine(config) as engine:
        size = engine.batch.eval_host_batch_size
        sampler = EvaluationSampler(len(dataset), batch_size=size)
        batches = list(engine.loader(dataset, sampler, training=False))
        assert (len(dataset), size) == (20, 24)
        (only,) = batches
        assert only.indices.tolist() == [*range(20), *[PADDING] * 4]
        assert len(only.images) == 24
        logits, labels = engine.predict_dataset(dataset)
        assert logits.shape == labels.shape == (20, 14)
        assert torch.equal(labels, torch.stack([dataset[row].labels for row in range(20)]))


def test_steps_that_do_not_fill_a_host_call_are_refused(ipu, commands):
    config = commands.config(*SHAPE)
    data = ChestXrayDataModule(config)
    with make_engine(config) as engine, pytest.raises(
        ConfigError, match=r"3 steps are left of 6, no multiple of batch\.device_iterations=2"
    ):
        engine.loader(data.dataset("train"), sampler_of(config, data, start=3), training=True)


class Loaders:
    """Loaders that were made and terminated; kept, because a deleted one terminates itself."""

    def __init__(self):
        self.made, self.ended = [], []

    @property
    def left(self):
        return [loader for loader in self.made if loader not in self.ended]


@pytest.fixture
def loaders(ipu, monkeypatch):
    poptorch, _ = ipu
    seen = Loaders()
    make, end = poptorch.DataLoader.__init__, poptorch.DataLoader.terminate

    def init(loader, *arguments, **settings):
        seen.made.append(loader)
        make(loader, *arguments, **settings)

    def terminate(loader):
        seen.ended.append(loader)
        end(loader)

    monkeypatch.setattr(poptorch.DataLoader, "__init__", init)
    monkeypatch.setattr(poptorch.DataLoader, "terminate", terminate)
    return seen


def test_every_loader_of_a_run_is_terminated(loaders, commands):
    commands.train("train.steps=4", "train.eval_every_steps=2", "engine.loader_mode=async")
    assert len(loaders.made) == 3, "one for training, one a validation"
    assert loaders.left == []


def test_loader_is_terminated_after_an_exception(loaders, commands, monkeypatch):
    def fail(engine, batch, *, lr):
        raise RuntimeError("in the middle of it")

    monkeypatch.setattr(PopTorchEngine, "train_step", fail)
    with pytest.raises(RuntimeError, match="in the middle of it"):
        commands.train("engine.loader_mode=async")
    assert len(loaders.made) == 1
    assert loaders.left == []


def test_loader_is_terminated_at_its_end(loaders, commands):
    """The loader of a validation must not live as long as the engine."""
    config = commands.config("engine.loader_mode=async")
    dataset = ChestXrayDataModule(config).dataset("val")
    with make_engine(config) as engine:
        engine.predict_dataset(dataset)
        assert len(loaders.made) == 1
        assert loaders.left == []


def test_closing_the_engine_terminates_its_loaders(loaders, commands):
    config = commands.config("engine.loader_mode=async")
    data = ChestXrayDataModule(config)
    with make_engine(config) as engine:
        batches = iter(
            engine.loader(data.dataset("train"), sampler_of(config, data), training=True)
        )
        next(batches)
        assert len(loaders.left) == 1
    assert loaders.left == []


def rows_of(own, *, size=24, num_samples=48, replicas=4, micro=2):
    sampler = EvaluationSampler(num_samples, batch_size=size)
    batches = ReplicaSampler(
        sampler, host_batch_size=size, micro_batch_size=micro, replicas=replicas, own=own
    )
    rows = RowSampler(batches, batch_size=size // replicas * len(own))
    listed = list(rows)
    assert len(rows) == len(listed)
    return listed


def test_two_processes_together_read_the_rows_of_one():
    one, first, second = rows_of(range(4)), rows_of(range(0, 2)), rows_of(range(2, 4))
    assert one == list(range(48))
    assert sorted([*first, *second]) == one
    assert not set(first) & set(second)


def test_process_reads_the_micro_batches_of_its_replicas():
    assert rows_of(range(0, 2))[:8] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert rows_of(range(2, 4))[:8] == [4, 5, 6, 7, 12, 13, 14, 15]


def test_last_batch_is_padded_in_every_process():
    first, second = rows_of(range(0, 2), num_samples=30), rows_of(range(2, 4), num_samples=30)
    assert len(first) == len(second) == 24
    assert sorted(row for row in [*first, *second] if row != PADDING) == list(range(30))
    assert [*first, *second].count(PADDING) == 18


def test_batch_of_a_wrong_size_is_refused(ipu, commands):
    with make_engine(commands.config()) as engine, pytest.raises(AssertionError, match="multiple"):
        engine.train_step(Batch.zeros(6, image_size=32, num_classes=14), lr=0.1)


class HangingReader(FileReader):
    """A loader process hangs on the second image of a batch."""

    def read(self, rows, out):
        if multiprocessing.parent_process() is not None and rows[0] % 2:
            time.sleep(600)
        super().read(rows, out)


def hung_error(commands, *overrides):
    config = commands.config(*SHAPE, "data.cache=off", *overrides)
    data = ChestXrayDataModule(config)
    dataset = data.dataset("train")
    dataset._reader.__class__ = HangingReader
    with pytest.raises(DataError) as raised, make_engine(config) as engine:
        list(engine.loader(dataset, sampler_of(config, data), training=True))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_hung_worker_is_named_with_its_image(ipu, commands):
    error = hung_error(commands, "data.num_workers=1", "data.worker_timeout_s=1")
    assert re.search(
        r"no batch for 1 s\. Loader process 0 was reading \d+_\d+\.png \(/.*png\)\.", error
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [0, 1])
def test_hung_process_of_an_asynchronous_loader_is_named_with_its_image(
    front_end, commands, workers
):
    """PopTorch waits for it without limit."""
    settings = ("engine.loader_mode=async", f"data.num_workers={workers}")
    error = hung_error(commands, *settings, "data.worker_timeout_s=45")
    assert re.search(r"[Ll]oader process 0 was reading \d+_\d+\.png \(/.*png\)\.", error)
