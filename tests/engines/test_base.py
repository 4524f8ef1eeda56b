"""What the engines share: checks of a batch, and errors of the loader's workers."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import engine_of, module_of
from torch.utils.data import get_worker_info

from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.base import check_batch
from cxr_vit.errors import DataError


@pytest.fixture
def make_engine(make_config):
    def make(*overrides):
        config = make_config(*overrides)
        return engine_of(config, module_of(config))

    return make


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(4, 1, 8, 8)}, "float32"),
        ({"images": torch.zeros(4, 8, 8, dtype=torch.uint8)}, r"\[4, 8, 8\]"),
        ({"images": torch.zeros(5, 1, 8, 8, dtype=torch.uint8)}, "5 samples are no multiple of 4"),
        ({"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}, "0 samples"),
        ({"labels": torch.zeros(3, 14)}, None),
    ],
)
def test_batch_of_another_layout_is_refused(change, words):
    batch = Batch.zeros(4, image_size=8, num_classes=14)
    check_batch(batch, 4)
    with pytest.raises(AssertionError, match=words):
        check_batch(batch._replace(**change), 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named_in_one_line(
    make_config, make_engine, sample_root, tmp_path, workers
):
    root = tmp_path / "data"
    shutil.copytree(str(sample_root), str(root))
    overrides = (f"data.num_workers={workers}", "data.cache=off", f"data.root={root}")
    dataset = ChestXrayDataModule(make_config(*overrides)).dataset("test")
    name = dataset.image_names[3]
    (path,) = Path(root).rglob(name)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError) as caught:
        make_engine(*overrides).predict_dataset(dataset)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and "Traceback" not in message


class DyingDataset:
    """Two batches of padding, the second of which kills the worker that reads it."""

    def __getitems__(self, draws):
        if draws[0] > 0 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return Batch.zeros(len(draws), image_size=32, num_classes=14)

    def __len__(self):
        return 16


def test_killed_worker_is_a_data_error_with_advice(make_engine):
    engine = make_engine("data.num_workers=1", "batch.eval_micro_batch_size=8")
    words = r"DataLoader worker .*\n.*Lower data\.num_workers"
    with pytest.raises(DataError, match=words) as raised, engine:
        engine.predict_dataset(DyingDataset())
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_killed_worker_noticed_outside_the_loader_is_a_data_error(make_engine):
    """torch's handler of SIGCHLD raises in whatever the main process executes."""
    error = RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")
    with pytest.raises(DataError, match=r"pid 17.*\n.*/dev/shm"), make_engine():
        raise error


def test_other_errors_pass_through_the_engine(make_engine):
    engine = make_engine()
    with pytest.raises(RuntimeError, match=r"^a bug$"), engine:
        raise RuntimeError("a bug")
    assert engine.failed


@pytest.mark.parametrize("first", [None, ValueError("another")])
def test_killed_worker_noticed_while_closing_is_a_data_error(make_engine, monkeypatch, first):
    engine = make_engine()

    def close():
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")

    monkeypatch.setattr(engine, "close", close)
    expected = DataError if first is None else ValueError
    with pytest.raises(expected), engine:
        raise_if_given(first)


def raise_if_given(error):
    if error is not None:
        raise error
