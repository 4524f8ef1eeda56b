"""A process that ends between any two file operations leaves a whole checkpoint.

A forked child counts its file operations with an audit hook and ends at the k-th; every k is tried.
An operation that opens a file for writing counts twice: before it, and with the file still empty.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, List, Optional

import pytest
import torch

import train
from cxr_vit.checkpoint_files import has_checkpoints, newest_whole
from cxr_vit.engines.base import EngineState
from cxr_vit.training import checkpoint as module
from cxr_vit.training.checkpoint import CheckpointStore, load_checkpoint

from .runs import SMALL, digests, named_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

_CHANGES = ("os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate")
_OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_DIED, _FINISHED, _FAILED = 9, 0, 1


class Countdown:
    """Ends the process at the k-th file operation within a folder."""

    def __init__(self, folder: Path, k: int) -> None:
        self.folder = str(folder)
        self.left = k
        self.is_counting = True

    def __call__(self, event: str, arguments: Any) -> None:
        if not self.is_counting or not (event in _CHANGES or event == "open"):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else ""
        if event == "os.symlink":
            path = os.fsdecode(arguments[1])
        # shutil.rmtree names the entries of a folder relative to it.
        if os.path.isabs(path) and not path.startswith(self.folder):
            return
        if event != "open":
            self.count()
        elif arguments[2] & _OPENED_TO_WRITE and path:
            self.count()
            self.count(lambda: os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)))

    def count(self, last: Callable[[], Any] = lambda: None) -> None:
        self.left -= 1
        if self.left == 0:
            self.is_counting = False
            last()
            os._exit(_DIED)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Count a call whose operations are not audited, as those of safetensors."""

        def counted(*arguments: Any, **named: Any) -> Any:
            self.count()
            result = function(*arguments, **named)
            self.count()
            return result

        return counted


def dies_at(k: int, folder: Path, action: Callable[[], Any]) -> bool:
    """Run the action in a child that ends at its k-th operation; False if it finished before."""
    pid = os.fork()
    if pid == 0:
        status = _FAILED
        try:
            countdown = Countdown(folder, k)
            module.save_file = countdown.around(module.save_file)
            sys.addaudithook(countdown)
            action()
            status = _FINISHED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.WEXITSTATUS(os.waitpid(pid, 0)[1])
    assert status in (_DIED, _FINISHED)
    return status == _DIED


# The store


def save(store: CheckpointStore, step: int, value: float) -> Path:
    weights = {"classifier.bias": torch.full((2,), value)}
    moments = {name: torch.full((2,), value) for name in ("exp_avg", "exp_avg_sq")}
    slots = {"classifier.bias": {**moments, "step": torch.tensor(3.0)}}
    state = EngineState(weights, slots, "torch.AdamW", {"updates": 3.0})
    # What a resume relies on; other keys are the trainer's.
    known = {"labels": ["a", "b"], "csv_sha256": "", "split_sha256": "", "split_kind": "official"}
    trainer_state = {
        **known,
        "seed": 0,
        "global_batch_size": 8,
        "evaluated_step": step,
        "best_score": value,
        "best_step": step,
        "callbacks": {},
    }
    files = {"config.json": "{}", "preprocessor_config.json": "{}"}
    return store.save(step, state, files=files, trainer_state=trainer_state)


def store_of(run: Path) -> CheckpointStore:
    return CheckpointStore(run / "checkpoints")


def nothing(run: Path) -> None:
    (run / "checkpoints").mkdir()


def older(run: Path) -> None:
    store = store_of(run)
    store.link("best", save(store, 3, 3.0))


def older_and_same(run: Path) -> None:
    older(run)
    save(store_of(run), 6, 6.0)


def save_link_and_prune(run: Path) -> None:
    store = store_of(run)
    store.link("best", save(store, 6, 7.0))
    store.prune(1)


def newest(run: Path) -> Optional[Path]:
    """Return the checkpoint that `--resume` takes."""
    found = newest_whole(run)
    assert not found.reasons, "a kill damages no checkpoint"
    return found.checkpoint


@pytest.mark.parametrize(
    "every", [pytest.param(4, id="some"), pytest.param(1, id="all", marks=pytest.mark.faults)]
)
@pytest.mark.parametrize(
    ("before", "allowed"),
    [
        (nothing, [None, 7.0]),
        (older, [3.0, 7.0]),
        (older_and_same, [3.0, 6.0, 7.0]),
    ],
    ids=["first", "another", "again"],
)
def test_store_keeps_a_whole_checkpoint(tmp_path, before, allowed, every):
    original = tmp_path / "original"
    original.mkdir()
    before(original)
    found: List[Optional[float]] = []
    k, died = 1 - every, True
    while died:
        k += every
        run = tmp_path / str(k)
        shutil.copytree(str(original), str(run), symlinks=True)
        died = dies_at(k, run, lambda run=run: save_link_and_prune(run))
        path = newest(run)
        value = None
        if path is not None:
            state, content = load_checkpoint(path)
            value = float(state.weights["classifier.bias"][0])
            assert value == content["best_score"], "weights and state are of one checkpoint"
        assert value in allowed, f"operation {k}: {value}"
        found.append(value)
        _check_that_saving_goes_on(run)
    assert k > 15, "operations were counted"
    assert found[-1] == 7.0
    assert found == sorted(found, key=lambda value: value or 0.0), "never back to an older one"


def _check_that_saving_goes_on(run: Path) -> None:
    """Do what a resume does, and save again: nothing is left of the killed process."""
    store, path = store_of(run), newest(run)
    if path is not None:
        step = load_checkpoint(path)[1]["step"]
        assert store.restore(step, best_step=step)
        names = {name: store.linked(name) for name in ("last", "best")}
        assert {found and found.name for found in names.values()} == {f"step_{step:08d}"}
    store.link("best", save(store, 9, 9.0))
    store.prune(1)
    path = newest(run)
    assert path is not None and load_checkpoint(path)[1]["step"] == 9
    left = {path.name for path in store.folder.iterdir()}
    assert left == {"step_00000009", "last", "best"}, left


# A whole run


@pytest.mark.parametrize(
    "every", [pytest.param(23, id="some"), pytest.param(1, id="all", marks=pytest.mark.faults)]
)
def test_run_ends_equal_wherever_it_was_killed(cached_root, tmp_path, every):
    given = ["--config", "vit_demo", *SMALL, f"data.root={cached_root}", "loggers=[jsonl]"]
    given += ["train.steps=4", "train.checkpoint_every_steps=2", "train.eval_every_steps=2"]
    given += ["train.log_every_steps=2", "train.keep_last=1"]
    whole = tmp_path / "whole"
    assert train.main([*given, f"run.dir={whole}"]) == 0
    expected = digests(named_checkpoint(whole, "last"))
    k, died = 1, True
    while died:
        parent = tmp_path / str(k)
        parent.mkdir()
        run = parent / "run"
        words = [*given, f"run.dir={run}"]
        died = dies_at(k, parent, lambda words=words: train.main(words))
        if died:
            again = ["--resume", str(run)] if has_checkpoints(run) else words
            assert train.main(again) == 0, f"operation {k}"
        assert digests(named_checkpoint(run, "last")) == expected, f"operation {k}"
        shutil.rmtree(str(parent))
        k += every
    assert k > 40, "operations were counted"
