"""A run that a signal stops and that goes on in other processes is the run that nothing stopped."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification

import evaluate
import train

from .launch import ROOT, finish, needs_pipelining, run, start
from .worker import copies, has_gradient, pipeline

pytestmark = pytest.mark.slow

STEPS = 40
#: AdamW, and a rate that falls with the step's cosine: a step, a moment or a rate that is lost in
#: between shows. (At the demo's own rate so few images are fitted in so few steps that rounding
#: grows tenfold every three of them.) The seven images of validation and the 20 of the test split
#: fill no batch.
DEMO = (
    *["--config", ROOT / "configs" / "vit_demo.yaml"],
    "batch.micro_batch_size=4",
    "batch.eval_micro_batch_size=3",
    f"train.steps={STEPS}",
    "train.log_every_steps=1",
    "train.eval_every_steps=20",
    "train.checkpoint_every_steps=20",
    "optim.lr=3e-4",
    "optim.max_grad_norm=0.1",
    "engine.device=cpu",
)


class Leg(NamedTuple):
    """A part of a run.

    `processes` are torchrun's, None without it; `says` is in the line that tells the engine.
    """

    processes: Optional[int]
    overrides: Sequence[str]
    says: str


ALONE = Leg(None, ("engine.name=torch", *copies(1)), "torch engine on CPU in fp32")
FOUR_STAGES = Leg(4, pipeline("1f1b", "[1, 1, 1, 1]"), "pipeline engine on CPU in 4 processes")
TWO_BY_TWO = Leg(4, pipeline("gpipe", "[2, 2]", 2), "pipeline engine on CPU in 4 processes")
TWO_REPLICAS = Leg(2, ("engine.name=torch", *copies(2)), "torch engine on CPU in 2 processes")


class Travelled(NamedTuple):
    """A run that went a long way: its folder, where it was stopped, and its last leg."""

    folder: Path
    stops: List[int]
    last: Leg


@pytest.fixture(scope="module")
def whole(sample_root, tmp_path_factory):
    """The run that nothing stopped, in one process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    given = (*DEMO, *ALONE.overrides, f"data.root={sample_root}", f"run.dir={folder}")
    assert train.main([str(word) for word in given]) == 0
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            [FOUR_STAGES, ALONE, TWO_BY_TWO, FOUR_STAGES], id="stages", marks=needs_pipelining
        ),
        pytest.param([TWO_REPLICAS, ALONE, TWO_REPLICAS], id="replicas"),
    ],
)
def travelled(request, sample_root, tmp_path_factory):
    """The same run, stopped by SIGTERM after step 10 and then after a few steps again."""
    *stopped, last = request.param
    folder = tmp_path_factory.mktemp("runs") / "travelled"
    arguments = (*DEMO, f"data.root={sample_root}", f"run.dir={folder}")
    stops: List[int] = []
    for leg in stopped:
        process = start(leg.processes, "train.py", *arguments, *leg.overrides)
        wait_for_step(stops[-1] + 3 if stops else 10, folder, process)
        process.send_signal(signal.SIGTERM)
        done = finish(process)
        assert leg.says in done.stdout, f"{done.stdout}\n{done.stderr}"
        state = json.loads((checkpoint(folder) / "trainer_state.json").read_text())
        stops.append(state["step"])
        arguments = ("--resume", folder)
    assert last.says in run(last.processes, "train.py", *arguments, *last.overrides).stdout
    return Travelled(folder, stops, last)


def wait_for_step(step, folder, process):
    deadline = time.monotonic() + 200
    while not any(number >= step for number in losses(folder)):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def losses(folder) -> Dict[int, float]:
    """The loss of each step that was logged."""
    return {event["step"]: event["train/loss"] for event in events(folder) if "train/loss" in event}


def events(folder):
    path = folder / "metrics.jsonl"
    # The last line may be half written.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def checkpoint(folder):
    return folder / "checkpoints" / "last"


def predictions(report):
    with (report / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def near(expected):
    return pytest.approx(expected, rel=0, abs=1e-5)


def test_it_was_stopped_on_its_way(travelled):
    assert 10 <= travelled.stops[0] < 20
    assert travelled.stops == sorted(set(travelled.stops))
    assert travelled.stops[-1] < STEPS


def test_the_losses_are_those_of_the_run_that_nothing_stopped(travelled, whole):
    ours, expected = losses(travelled.folder), losses(whole)
    assert list(ours) == list(expected) == list(range(1, STEPS + 1))
    assert ours == near(expected)
    norms = [event["train/grad_norm"] for event in events(whole) if "train/grad_norm" in event]
    assert max(norms) > 0.1, "gradients are clipped"


def test_the_validations_are_those_of_the_run_that_nothing_stopped(travelled, whole):
    ours, expected = (
        {event["step"]: event["val/loss"] for event in events(folder) if "val/loss" in event}
        for folder in (travelled.folder, whole)
    )
    assert list(expected) == [20, 40]
    assert ours == near(expected)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_the_last_checkpoint_is_that_of_the_run_that_nothing_stopped(travelled, whole, file):
    ours, expected = (load_file(checkpoint(folder) / file) for folder in (travelled.folder, whole))
    assert ours.keys() == expected.keys()
    for name in expected:
        if has_gradient(name.split("/")[0]):
            difference = (ours[name] - expected[name]).abs().max()
            assert difference <= 1e-5, f"{name} differs by {difference:.2g}"


def test_the_checkpoint_loads_in_plain_transformers(travelled, whole):
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours, expected = (
            ViTForImageClassification.from_pretrained(checkpoint(folder)).eval()(images).logits
            for folder in (travelled.folder, whole)
        )
    assert (ours - expected).abs().max() < 1e-4
    assert expected.std(dim=0).min() > 1e-3, "images have scores of their own"


def test_evaluate_writes_the_predictions_of_one_process(travelled, sample_root, tmp_path):
    leg, last = travelled.last, checkpoint(travelled.folder)
    given = ("--checkpoint", last, "--out", tmp_path / "ours", *leg.overrides)
    assert leg.says in run(leg.processes, "evaluate.py", *given).stdout
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
