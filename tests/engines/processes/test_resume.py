"""A run that SIGTERM stops and that resumes in other processes repeats the uninterrupted run."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import threading
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, Sequence, Tuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification

import evaluate
import train
from cxr_vit.cli import EXIT_STOPPED

from .launch import (
    ROOT,
    assert_stopped,
    events,
    finish,
    fork,
    jobs,
    losses,
    needs_pipelining,
    saved_step,
)
from .worker import copies, has_gradient, pipeline

pytestmark = pytest.mark.slow

STEPS = 40
#: AdamW and a cosine schedule: a lost step, moment or learning rate changes the losses. (At the
#: demo's own rate these few images are fitted in so few steps that rounding errors grow tenfold
#: every three steps.) The 7 images of validation and the 20 of the test split fill no batch.
DEMO = (
    *["--config", ROOT / "configs" / "vit_demo.yaml"],
    "batch.micro_batch_size=4",
    "batch.eval_micro_batch_size=3",
    f"train.steps={STEPS}",
    "model.pooling=class",
    "augment.horizontal_flip=0",
    "model.drop_path=0.1",
    "train.log_every_steps=1",
    "train.eval_every_steps=20",
    "train.checkpoint_every_steps=20",
    "optim.lr=3e-4",
    "optim.max_grad_norm=0.1",
    "engine.device=cpu",
    "loggers=[jsonl]",
)


class Leg(NamedTuple):
    """A part of a run, with the number of torchrun's processes; 1: in the process of the tests."""

    processes: int
    overrides: Sequence[str]
    description: str


ALONE = Leg(1, ("engine.name=torch", *copies(1)), "torch engine on CPU in fp32")
FOUR_STAGES = Leg(4, pipeline("1f1b", "[1, 1, 1, 1]"), "pipeline engine on CPU in 4 processes")
TWO_BY_TWO = Leg(4, pipeline("gpipe", "[2, 2]", 2), "pipeline engine on CPU in 4 processes")
TWO_STAGES = Leg(2, pipeline("1f1b", "[2, 2]"), "pipeline engine on CPU in 2 processes")
TWO_REPLICAS = Leg(2, ("engine.name=torch", *copies(2)), "torch engine on CPU in 2 processes")


class Interrupted(NamedTuple):
    """A run that was stopped several times, the steps where it was, and who scores it."""

    folder: Path
    stops: List[int]
    scores: Leg


@pytest.fixture(scope="module")
def whole(sample_root, tmp_path_factory):
    """The uninterrupted run, in one process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    given = (*DEMO, *ALONE.overrides, f"data.root={sample_root}", f"run.dir={folder}")
    assert train.main([str(word) for word in given]) == 0
    return folder


@contextlib.contextmanager
def sigterm_after(folder: Path, step: int) -> Iterator[None]:
    """Send this process SIGTERM when a run has made a step."""
    ended = threading.Event()

    def send() -> None:
        while not any(done >= step for done in losses(folder)):
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # if the run has just ended
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def train_alone(arguments: Sequence[Any]) -> Tuple[int, str]:
    """Run train.py in this process; return its status and output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = train.main([str(word) for word in arguments])
    return status, output.getvalue()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            ([ALONE, TWO_BY_TWO, FOUR_STAGES, ALONE], TWO_STAGES),
            id="stages",
            marks=needs_pipelining,
        ),
        pytest.param(([ALONE, TWO_REPLICAS, ALONE], TWO_REPLICAS), id="replicas"),
    ],
)
def interrupted(request, sample_root, tmp_path_factory):
    """The same run, stopped by SIGTERM after step 10 and then every few steps."""
    (*stopped, last), scores = request.param
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    arguments = (*DEMO, f"data.root={sample_root}", f"run.dir={folder}")
    stops: List[int] = []
    for leg in stopped:
        stop_leg(leg, arguments, folder, stops)
        arguments = ("--resume", folder)
    status, output = train_alone((*arguments, *last.overrides))
    assert status == 0
    assert last.description in output
    assert f"from step {stops[-1]}" in output
    return Interrupted(folder, stops, scores)


def stop_leg(leg: Leg, arguments: Sequence[Any], folder: Path, stops: List[int]) -> None:
    """Run a leg until SIGTERM stops it; append the step."""
    step = stops[-1] + 3 if stops else 10
    if leg.processes == 1:
        with sigterm_after(folder, step):
            status, output = train_alone((*arguments, *leg.overrides))
        assert status == EXIT_STOPPED
    else:
        with jobs() as launch:
            job = launch(leg.processes, "train.py", *arguments, *leg.overrides)
            job.wait_for_step(folder, step)
            done = job.finish(since=job.terminate())
        assert done.returncode != 0
        output = done.stdout
    assert leg.description in output
    assert not stops or f"from step {stops[-1]}" in output
    assert_stopped(output, folder, "SIGTERM received")
    stops.append(saved_step(folder))


def checkpoint(folder):
    return folder / "checkpoints" / "last"


def predictions(report):
    with (report / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def near(expected):
    return pytest.approx(expected, rel=0, abs=1e-5)


def test_run_is_stopped_before_its_end(interrupted):
    assert 10 <= interrupted.stops[0] < 20
    assert interrupted.stops == sorted(set(interrupted.stops))
    assert interrupted.stops[-1] < STEPS


def test_resume_repeats_the_losses_of_the_uninterrupted_run(interrupted, whole):
    ours, expected = losses(interrupted.folder), losses(whole)
    assert list(ours) == list(expected) == list(range(1, STEPS + 1))
    assert ours == near(expected)
    norms = [event["train/grad_norm"] for event in events(whole) if "train/grad_norm" in event]
    assert max(norms) > 0.1, "gradients are clipped"


def test_resume_repeats_the_validations(interrupted, whole):
    ours, expected = (
        {event["step"]: event["val/loss"] for event in events(folder) if "val/loss" in event}
        for folder in (interrupted.folder, whole)
    )
    assert list(expected) == [20, 40]
    assert ours == near(expected)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_resume_repeats_the_last_checkpoint(interrupted, whole, file):
    ours, expected = (
        load_file(checkpoint(folder) / file) for folder in (interrupted.folder, whole)
    )
    assert ours.keys() == expected.keys()
    for name in expected:
        if has_gradient(name.split("/")[0]):
            difference = (ours[name] - expected[name]).abs().max()
            assert difference <= 1e-5, f"{name} differs by {difference:.2g}"


def test_checkpoint_loads_in_plain_transformers(interrupted, whole):
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours, expected = (
            ViTForImageClassification.from_pretrained(checkpoint(folder)).eval()(images).logits
            for folder in (interrupted.folder, whole)
        )
    assert (ours - expected).abs().max() < 1e-4
    assert expected.std(dim=0).min() > 1e-3, "scores differ between images"


def test_evaluate_writes_the_predictions_of_one_process(interrupted, sample_root, tmp_path):
    leg, last = interrupted.scores, checkpoint(interrupted.folder)
    given = ("--checkpoint", last, "--out", tmp_path / "ours", *leg.overrides)
    done = finish(fork(leg.processes, ROOT / "evaluate.py", *given))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert leg.description in done.stdout
    given = ("--checkpoint", last, "--out", tmp_path / "expected", *ALONE.overrides)
    assert evaluate.main([str(word) for word in given]) == 0
    ours, expected = (predictions(tmp_path / name) for name in ("ours", "expected"))
    assert len(ours) == len((sample_root / "test_list.txt").read_text().split()) == 20
    for row, other in zip(ours, expected):
        assert row.keys() == other.keys()
        for column, value in other.items():
            if column.endswith("_probability"):
                assert float(row[column]) == near(float(value)), column
            else:
                assert row[column] == value, column
