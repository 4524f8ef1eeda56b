"""train.py in separate processes: signals, and several processes as poprun starts them."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from cxr_vit.config import BatchPlan
from cxr_vit.engines.ipu.options import graph_options
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError
from fakes import loading

from .commands import Run, make_engine
from .launch import start


@pytest.fixture
def launched():
    """Start processes, and end them after the test."""
    processes = []

    def launch(*arguments, **settings):
        processes.append(start(*arguments, **settings))
        return processes[-1]

    yield launch
    for process in processes:
        if process.poll() is None:
            process.kill()
        for stream in (process.stdout, process.stderr):
            stream.close()
        process.wait()


def needs(which):
    reason = loading.available() if which == "front end" else None
    if reason:
        pytest.skip(reason)


def ends(group):
    """Whether all processes of a group end; those of multiprocessing end last."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("loader", ["sync", "async"])
@pytest.mark.parametrize("which", ["stand-in", "front end"])
def test_signal_to_the_process_group_saves_and_exits_75(commands, launched, which, loader):
    needs(which)
    run = Run(commands.folder / "run", 0, [], [])
    settings = ("train.steps=400", f"engine.loader_mode={loader}", f"run.dir={run.path}")
    arguments = ["--config", commands.file, *commands.overrides(*settings)]
    process = launched(which, "train", *arguments)
    deadline = time.monotonic() + 120
    while not ((run.path / "metrics.jsonl").exists() and len(run.logged) >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "SIGTERM received" in output
    # The signal ends multiprocessing's fork server; PopTorch's loader process then raises EOFError.
    assert "Traceback" not in errors.split("Process ForkServerProcess")[0], errors
    step = json.loads((run.checkpoint() / "trainer_state.json").read_text())["step"]
    assert 3 <= step < 400
    assert ends(process.pid), "a process of the run is left"


# Several processes run on the stand-in only: popdist is part of the SDK.

TWO = (
    "batch.replicas=2",
    "train.steps=3",
    "schedule.name=constant",
    "schedule.warmup_ratio=0",
    # The stand-in's processes exchange no gradients, so the weights must not change.
    "optim.lr=1e-12",
)


def surroundings(index, local=1, total=2):
    return {
        "POPDIST_NUM_TOTAL_REPLICAS": str(total),
        "POPDIST_NUM_LOCAL_REPLICAS": str(local),
        "POPDIST_REPLICA_INDEX_OFFSET": str(index * local),
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_SIZE": str(total // local),
    }


def as_poprun(launched, commands, program, *arguments):
    """Run two processes; return the output of each."""
    exchange = commands.folder / f"exchange{len(list(commands.folder.glob('*')))}"
    exchange.mkdir()
    processes = [
        launched(
            "stand-in",
            program,
            *arguments,
            more={
                **surroundings(index),
                "EXCHANGE_FOLDER": str(exchange),
                "PYTHONPATH": str(Path(__file__).parent / "exchange"),
            },
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


def test_two_processes_train_and_score_like_one(launched, commands, torch_run):
    expected = torch_run(*TWO)
    run = Run(commands.folder / "run", 0, [], [])
    outputs = as_poprun(
        launched,
        commands,
        "train",
        *["--config", commands.file, *commands.overrides(*TWO), f"run.dir={run.path}"],
        "loggers=[tensorboard, jsonl]",
    )
    near = {"rel": 0, "abs": 1e-5}
    assert run.logged == pytest.approx(expected.logged, **near)
    assert run.logged[0] != run.logged[1]
    (ours,), (theirs,) = run.scores, expected.scores
    assert ours["val/loss"] == pytest.approx(theirs["val/loss"], **near)
    assert ours["val/auroc_macro"] == pytest.approx(theirs["val/auroc_macro"], **near)
    assert len(list(run.path.glob("events*"))) == 1
    assert not list(run.path.glob(".lock"))
    (said, progress), (silence, errors) = outputs
    assert "8 IPUs (2 x 4 stages by 2 processes, 8 reserved)" in said
    assert "step 3/3" in progress
    assert "step" not in errors
    assert "finished" not in silence

    reports = as_poprun(
        launched,
        commands,
        "evaluate",
        *["--checkpoint", run.checkpoint(), "--out", commands.folder / "report"],
    )
    with (commands.folder / "report" / "predictions.csv").open(newline="") as file:
        names = [row["image"] for row in csv.DictReader(file)]
    assert len(set(names)) == len(names) == 20
    assert "macro AUROC" in reports[0][0]
    assert "macro AUROC" not in reports[1][0]
    alone = commands.evaluate(expected.checkpoint())
    with (commands.folder / "report" / "predictions.csv").open(newline="") as file:
        together = [
            [float(row[name]) for name in row if name.endswith("probability")]
            for row in csv.DictReader(file)
        ]
    assert len(together) == len(alone)
    for ours, theirs in zip(together, alone):
        assert ours == pytest.approx(theirs, **near)


@pytest.fixture
def instance(monkeypatch):
    """Set the environment of process `index` of poprun, with the stand-in."""
    with loading.stand_in() as modules:

        def pretend(index, local, total):
            for name, value in surroundings(index, local, total).items():
                monkeypatch.setenv(name, value)
            return modules

        yield pretend


@pytest.mark.parametrize("index", [0, 1])
def test_process_has_its_own_replicas(instance, commands, index):
    instance(index, 2, 4)
    launch = Launch.from_environment()
    assert (launch.rank, launch.world_size, launch.local_replicas) == (index, 2, 2)
    config = commands.config("batch.replicas=4", "batch.micro_batch_size=3")
    batch = BatchPlan.from_section(config.batch)
    for options in graph_options(config, batch, precision="fp32", cache=None, by_poprun=True):
        entries = options.toDict()
        assert entries["replication_factor"] == 2
        assert entries["num_distributed_processes"] == 2
        assert entries["distributed_process_id"] == index
    with make_engine(config) as engine:
        assert engine.is_main == (index == 0)
        assert engine.batch.global_batch_size == 3 * 7 * 4
        assert engine.local_batch.global_batch_size == 3 * 7 * 2
        assert "(4 x 4 stages by 2 processes, 16 reserved)" in engine.describe()


def test_batches_of_all_processes_equal_those_of_one(instance, commands):
    from cxr_vit.data.datamodule import ChestXrayDataModule
    from cxr_vit.data.sampler import TrainingSampler

    config = commands.config("batch.replicas=4", "batch.device_iterations=2")
    data = ChestXrayDataModule(config)

    def sampler():
        return TrainingSampler(
            len(data.splits.train),
            global_batch_size=28,
            device_iterations=2,
            seed=3,
            start_step=0,
            total_steps=4,
        )

    parts = []
    for index in range(2):
        instance(index, 2, 4)
        with make_engine(config) as engine:
            batches = engine.loader(data.dataset("train"), sampler(), training=True)
            # [device iteration and accumulation][replica of this process]
            parts.append([batch.indices.reshape(14, 2) for batch in batches])
    together = [torch.cat(pair, dim=1).ravel().tolist() for pair in zip(*parts)]
    images = len(data.splits.train)
    assert together == [[draw % images for draw in draws] for draws in sampler()]


def test_number_of_replicas_must_match_poprun(instance, commands):
    instance(0, 1, 2)
    with pytest.raises(ConfigError, match=r"batch\.replicas=4, but poprun started 2"):
        make_engine(commands.config("batch.replicas=4"))


def test_moments_cannot_be_sharded_over_one_replica(instance, commands):
    config = commands.config("batch.replicas=4", "engine.replicated_tensor_sharding=true")
    instance(0, 1, 4)
    with pytest.raises(ConfigError, match="poprun --num-instances 2"):
        make_engine(config)
    instance(0, 2, 4)
    make_engine(config).close()
