"""What the engines share: checks of a batch, and errors of the loader's workers."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from conftest import engine_of, module_of
from cxr_vit import Callback
from cxr_vit.commands import train
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch
from cxr_vit.data.images import FileReader
from cxr_vit.engines.allocator import keep_freed_memory
from cxr_vit.engines.base import Interrupted, check_batch
from cxr_vit.engines.workers import _start_worker
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


HUNG = 11  # the row that the second of three batches ends with


class HangingReader(FileReader):
    """Its loader process hangs on one image, and does not answer SIGTERM."""

    def read(self, rows, out):
        if get_worker_info() is not None and HUNG in rows:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        super().read(rows, out)


class DyingReader(FileReader):
    """Its loader process is killed while it reads one image."""

    def read(self, rows, out):
        if get_worker_info() is not None and HUNG in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        super().read(rows, out)


def images_read_by(reader, config):
    """The test images, their names and the paths of their files."""
    dataset = ChestXrayDataModule(config).dataset("test")
    dataset._reader.__class__ = reader
    (path,) = Path(config.data.root).rglob(dataset.image_names[HUNG])
    return dataset, f"{path.name} ({path})"


def children():
    return {process.pid for process in multiprocessing.active_children()}


@pytest.fixture
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(
    "start_method",
    [
        "fork",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("spawn", "forkserver")),
    ],
    indirect=True,
)
def test_hung_worker_is_named_with_its_image_and_ended(make_config, make_engine, start_method):
    timeout = 1 if start_method == "fork" else 30
    overrides = ("data.cache=off", f"data.worker_timeout_s={timeout}", "data.num_workers=2")
    dataset, image = images_read_by(HangingReader, make_config(*overrides))
    before, handler = children(), signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError) as raised, make_engine(*overrides) as engine:
        engine.predict_dataset(dataset)
    words = (
        f"no batch for {timeout} s. Loader process 1 was reading {image}. Is the file system hung?"
    )
    assert words in str(raised.value)
    assert "\n" not in str(raised.value) and "--resume" in str(raised.value)
    # Those of another test may end meanwhile.
    assert children() <= before, "nothing is left that Python would wait for at its end"
    assert callable(handler) is False or signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL


def test_killed_worker_is_named_with_its_image(make_config, make_engine):
    overrides = ("data.cache=off", "data.num_workers=2")
    dataset, image = images_read_by(DyingReader, make_config(*overrides))
    with pytest.raises(DataError) as raised, make_engine(*overrides) as engine:
        engine.predict_dataset(dataset)
    first, second = str(raised.value).splitlines()
    assert re.search(r"DataLoader worker \(pid.*\d+\)", first)
    assert first.endswith(f"It was reading {image}.")
    assert second == (
        "Out of memory, or of /dev/shm? Lower data.num_workers and resume with --resume."
    )
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_worker_of_a_cache_is_named_with_the_first_image_of_its_batch(make_config, make_engine):
    config = make_config()
    dataset = ChestXrayDataModule(config).dataset("test")
    watch = make_engine().watch
    start = watch.start(dataset, training=False, workers=2)
    entries = start.args[0]
    entries[1] = torch.tensor([17, 5])
    error = watch.dead_worker(RuntimeError("DataLoader worker (pid 17) is killed by signal: Bus. "))
    assert f"It was reading {dataset.image_names[5]} ({config.data.root}" in str(error)
    assert "films_32.u8)" in str(error)


def test_process_that_reads_no_image_is_not_blamed_on_one(make_config, make_engine):
    dataset = ChestXrayDataModule(make_config()).dataset("test")
    watch = make_engine().watch
    watch.start(dataset, training=True, workers=1)
    text = "gave no batch for 7.5 s. None of them was reading an image. Is the file"
    assert text in str(watch.timed_out(training=True, timeout_s=7.5))
    error = watch.dead_worker(RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus. "))
    assert "reading" not in str(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_limit_and_no_workers_load_as_before(make_config, make_engine, workers):
    limit = "null" if workers else "5"
    overrides = (f"data.num_workers={workers}", f"data.worker_timeout_s={limit}")
    dataset = ChestXrayDataModule(make_config(*overrides)).dataset("test")
    with make_engine(*overrides) as engine:
        logits, _ = engine.predict_dataset(dataset)
    assert len(logits) == len(dataset)


# The processes of evaluation


def test_one_set_of_processes_reads_every_validation(make_config, make_engine):
    overrides = ("data.num_workers=2", "train.steps=4")
    data = ChestXrayDataModule(make_config(*overrides))
    val, before = data.dataset("val"), children()
    with make_engine(*overrides) as engine:
        first, _ = engine.predict_dataset(val)
        kept = children() - before
        assert len(kept) == 2
        second, _ = engine.predict_dataset(val)
        assert torch.equal(first, second) and children() - before == kept
        engine.predict_dataset(data.dataset("test"))
        others = children() - before
        assert len(others) == 2 and not others & kept, "those of another split replace them"
        with pytest.raises(Interrupted):
            engine.predict_dataset(val, stops=lambda: True)
        assert children() <= before, "what a pass left unread is not in the next one"
        assert torch.equal(engine.predict_dataset(val)[0], first)
    assert children() <= before


class Noting(Callback):
    """Notes the processes after each validation; a number of them later, does something else."""

    def __init__(self, then):
        self.then = then
        self.seen = []

    def on_validation_end(self, trainer, module):
        self.seen.append(children())
        if len(self.seen) == 3:
            self.then()


def fail():
    raise ValueError("a bug")


@pytest.mark.parametrize("then", [fail, lambda: os.kill(os.getpid(), signal.SIGTERM)])
def test_no_loader_process_survives_a_run(make, then):
    before, noting = children(), Noting(then)
    overrides = ("data.num_workers=1", "train.steps=8", "train.eval_every_steps=2")
    run = make(*overrides, callbacks=[noting])
    with contextlib.suppress(ValueError):
        run.fit()
    assert run.trainer.global_step == 6 and len(noting.seen) == 3
    training, *others = [seen - before for seen in noting.seen]
    assert len(training) == 2 and others == [training, training], "of training and validation"
    assert children() <= before


def test_a_loader_process_drops_what_its_parent_keeps_for_the_next_step():
    """Until the parent writes it, the memory is shared; then it would be there twice."""
    if not keep_freed_memory():
        pytest.skip("malloc is not changed here")
    size, end = 256 * 2**20, multiprocessing.get_context("fork").Event()
    freed = [torch.ones(size // 64, dtype=torch.uint8) for _ in range(64)]
    del freed
    entries = torch.zeros(1, 2, dtype=torch.int64).share_memory_()

    def work():
        _start_worker(entries, 0)
        end.wait()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    while not entries[0, 0]:
        time.sleep(0.01)
    own, child = (memory_of(pid) for pid in (os.getpid(), process.pid))
    end.set()
    process.join()
    assert own - child > 0.8 * size


def memory_of(pid):
    """Resident bytes."""
    (line,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) * 1024


#: Trains; once a checkpoint is there, a loader process of the validation hangs or is killed.
TRAINS_WITH_A_FAULT = """
import os, signal, sys, time
from pathlib import Path
from torch.utils.data import get_worker_info
from cxr_vit import cli
from cxr_vit.commands import train
from cxr_vit.data.images import FileReader

fault, *words = sys.argv[1:]
last = Path(next(word for word in words if word.startswith("run.dir="))[8:]) / "checkpoints/last"
read = FileReader.read

def read_or_fail(reader, rows, out):
    if get_worker_info() is not None and len(reader) < 20 and last.exists():
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    read(reader, rows, out)

FileReader.read = read_or_fail
sys.argv[1:] = words
cli.run(train.main)
"""


@pytest.mark.parametrize("fault", ["hung", pytest.param("killed", marks=pytest.mark.exhaustive)])
def test_training_with_a_faulty_worker_ends_and_is_resumed(
    fault, small_overrides, repository, tmp_path
):
    folder = tmp_path / "run"
    settings = (*small_overrides, f"run.dir={folder}", "data.cache=off", "data.num_workers=2")
    settings = (*settings, "data.worker_timeout_s=2", "train.checkpoint_every_steps=2")
    done = subprocess.run(
        [sys.executable, "-c", TRAINS_WITH_A_FAULT, fault, *settings],
        cwd=str(repository),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("DataError: ") == (1 if fault == "hung" else 2), done.stderr
    assert re.search(r"was reading \d+_\d+\.png \(/.*\.png\)\.", done.stderr)
    # Workers that are ended while they send may say on their own, and at once, that the pipe is
    # closed (Python 3.8).
    files = re.findall(r'File "(.*?)"', done.stderr)
    assert all("multiprocessing" in file for file in files), done.stderr
    assert files or "Traceback" not in done.stderr
    state = json.loads((folder / "checkpoints" / "last" / "trainer_state.json").read_text())
    assert state["step"] == 2
    train.main(["--resume", str(folder)])
    state = json.loads((folder / "checkpoints" / "last" / "trainer_state.json").read_text())
    assert state["step"] == 6


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
