"""Runs of several processes in which one fails, hangs or is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Dict, List, NamedTuple

import pytest

import train
from conftest import SMALL
from cxr_vit.data.synthetic.dataset import write_sample

from .launch import (
    HAS_PIPELINING,
    SOON,
    assert_stopped,
    free_port,
    jobs,
    losses,
    needs_pipelining,
    parents,
    rank_of,
    run,
    saved_step,
    start,
)

pytestmark = pytest.mark.slow


def exhaustive(value):
    """Run this case only in `make test-all`: each start of processes takes about ten seconds."""
    return pytest.param(value, marks=pytest.mark.exhaustive)


#: train.py with a fault in one process.
FAILING = "tests/engines/processes/failing.py"

MORE = ("batch.gradient_accumulation=4", "train.log_every_steps=1")
LONG = "train.steps=100000"
#: TensorBoard takes a second to import.
JSONL = "loggers=[jsonl]"
NO_VALIDATION = ("train.eval_every_steps=100000", "train.checkpoint_every_steps=100000")
#: Three processes with one stage each; the middle one has two layers.
PIPELINE = (*SMALL, *MORE, "engine.name=pipeline", "pipeline.layers_per_stage=[1, 2, 1]")
#: Two processes.
TWO_STAGES = (*SMALL, *MORE, "engine.name=pipeline", "pipeline.layers_per_stage=[2, 2]")
#: Two processes with one replica each.
REPLICAS = (*SMALL, *MORE, "engine.name=torch", "batch.replicas=2")

#: Lines of stderr that belong to no error, ours and torchrun's.
QUIET = re.compile(
    r"step \d|INFO: |WARNING: |$|\[?[IW]\d{4} |(INFO|WARNING):torch\.distributed"
    r"|master_addr is only used"
)
#: First line of torchrun's own report of the failure.
TORCHRUN = re.compile(r"E\d{4} |ERROR:torch\.distributed\.elastic")


def state_of(process: int) -> str:
    return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0]


def skip_without_pipelining() -> None:
    if not HAS_PIPELINING:
        pytest.skip("the pipeline engine needs torch 2.10")


@pytest.fixture
def launched():
    """Start jobs; none of their processes survives the test."""
    with jobs() as launch:
        yield launch


def tensorboard_steps(folder: Path) -> List[int]:
    """Return the steps of the loss that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def content(folder: Path) -> Dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_lines(errors: str) -> List[str]:
    """Return the lines of stderr that belong to an error, up to torchrun's own report."""
    found = []
    for line in errors.splitlines():
        if TORCHRUN.match(line):
            break
        if not QUIET.match(line):
            found.append(line)
    return found


def only_error(errors: str, kind: str) -> str:
    """Return the one line with an error, which is printed first and once."""
    lines = error_lines(errors)
    assert len(lines) == 1 and lines[0].startswith(f"{kind}: "), errors
    assert errors.count(f"{kind}: ") == 1, errors
    return lines[0]


@needs_pipelining
@pytest.mark.parametrize("rank", [exhaustive(0), 1, exhaustive(2)])
def test_killed_stage_ends_all_processes_and_is_named(launched, sample_root, tmp_path, rank):
    job = launched(
        *(3, "train.py", *PIPELINE, f"data.root={sample_root}"),
        *(LONG, JSONL, f"run.dir={tmp_path}"),
    )
    job.wait_for_step(tmp_path, 4)
    done = job.finish(since=job.signal(rank, signal.SIGKILL))
    assert done.returncode != 0
    error = only_error(done.stderr, "ProcessLost")
    assert f"No sign of life from: stage {rank} (process {rank})." in error
    assert "lost the connection" in error and "--max-restarts" in error


@pytest.mark.parametrize("rank", [exhaustive(0), exhaustive(1)])
def test_killed_replica_ends_all_processes_and_is_named(launched, sample_root, tmp_path, rank):
    job = launched(
        2, "train.py", *REPLICAS, f"data.root={sample_root}", LONG, f"run.dir={tmp_path}"
    )
    job.wait_for_step(tmp_path, 4)
    done = job.finish(since=job.signal(rank, signal.SIGKILL))
    assert done.returncode != 0
    assert f"No sign of life from: process {rank}." in only_error(done.stderr, "ProcessLost")


@needs_pipelining
def test_only_the_failing_process_prints_its_error(launched, tmp_path):
    """Only the first stage reads images; they become unreadable during the run."""
    root, folder = tmp_path / "images", tmp_path / "run"
    write_sample(root, num_images=80, image_size=32, seed=0)
    settings = (*TWO_STAGES, f"data.root={root}", "data.cache=off", LONG, f"run.dir={folder}")
    job = launched(2, "train.py", *settings, JSONL)
    job.wait_for_step(folder, 2)
    broken = time.monotonic()
    for image in root.rglob("*.png"):
        image.write_bytes(image.read_bytes()[:100])
    done = job.finish(since=broken)
    assert done.returncode != 0
    assert ".png" in only_error(done.stderr, "DataError")
    assert "exitcode  : 2" in done.stderr


@pytest.mark.exhaustive
@needs_pipelining
def test_bug_in_one_process_prints_one_traceback(launched, sample_root, tmp_path):
    settings = (*PIPELINE, f"data.root={sample_root}", LONG, f"run.dir={tmp_path}")
    job = launched(3, FAILING, "bug", 2, *settings)
    job.wait_for_step(tmp_path, 3)
    done = job.finish(since=time.monotonic())
    assert done.returncode != 0
    lines = error_lines(done.stderr)
    assert lines[0] == "Traceback (most recent call last):", done.stderr
    assert lines[-1] == "ZeroDivisionError: a bug of ours", done.stderr
    assert "\n".join(lines).count("Traceback") == 1, done.stderr
    assert done.stderr.count("\nZeroDivisionError") == 1 and "ProcessLost" not in done.stderr


ONE_STAGE_EACH = ("engine.name=pipeline", "pipeline.layers_per_stage=[2, 2]")
MISTAKES = {
    "misspelt": (2, ("optim.learning_rate=1",), ["Did you mean 'optim.lr'?"]),
    "too few micro-batches": (
        2,
        (*ONE_STAGE_EACH, "batch.gradient_accumulation=1"),
        ["batch.gradient_accumulation=1 is less than the 2 stages"],
    ),
    "too few processes": (2, ("engine.name=pipeline",), ["needs 4 processes", "there are 2"]),
    "more processes than replicas": (
        2,
        ("engine.name=torch",),
        ["batch.replicas=1", "torchrun started 2 processes"],
    ),
    "one process": (None, ONE_STAGE_EACH, ["needs 2 processes", "there is 1"]),
}


@pytest.mark.parametrize(
    "mistake",
    ["too few processes", *map(exhaustive, sorted(set(MISTAKES) - {"too few processes"}))],
)
def test_wrong_setting_is_printed_once_and_leaves_no_run(launched, sample_root, tmp_path, mistake):
    processes, settings, words = MISTAKES[mistake]
    if "misspelt" not in mistake and "torch" not in settings[0]:
        skip_without_pipelining()
    settings = (*SMALL, f"data.root={sample_root}", *settings, f"run.root={tmp_path / 'runs'}")
    job = launched(processes, "train.py", *settings)
    done = job.finish(since=time.monotonic())
    assert done.returncode == (2 if processes is None else 1)
    error = only_error(done.stderr, "ConfigError")
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("runs/*"))


#: Seconds; at least as long as the starts of the processes may lie apart on a busy machine.
TIMEOUT = 10
#: Processes, settings, the rank that stops, its name, and what the others wait for.
SILENT = {
    "gpipe": (
        *(2, TWO_STAGES, 1),
        *("stage 1 (process 1)", r"stage 1\b"),
    ),
    "1f1b": (
        *(3, PIPELINE, 1),
        *("stage 1 (process 1)", r"stage 1\b"),
    ),
    "interleaved_1f1b": (
        *(2, (*TWO_STAGES, "pipeline.layers_per_stage=[1, 1, 1, 1]"), 0),
        *("stages 0 and 2 (process 0)", r"stage [02]\b"),
    ),
    "replicas": (2, REPLICAS, 1, "process 1", "the gradients of the other replicas"),
}


@pytest.mark.parametrize("case", ["1f1b", *map(exhaustive, sorted(set(SILENT) - {"1f1b"}))])
def test_silent_process_is_named_after_the_timeout(launched, sample_root, tmp_path, case):
    processes, settings, rank, name, awaited = SILENT[case]
    if case != "replicas":
        skip_without_pipelining()
        settings = (*settings, f"pipeline.schedule={case}")
    settings = (
        *settings,
        f"data.root={sample_root}",
        f"engine.timeout_s={TIMEOUT}",
        f"run.dir={tmp_path}",
    )
    job = launched(processes, FAILING, "silence", rank, *settings, LONG, JSONL, *NO_VALIDATION)
    job.wait_for_step(tmp_path, 1)
    workers = job.workers()
    job.wait_for(lambda: state_of(workers[rank]) == "T")
    since = time.monotonic()
    others = {worker for other, worker in enumerate(workers) if other != rank}
    job.wait_for(lambda: not others & set(parents()), seconds=SOON)
    seconds = time.monotonic() - since
    print(f"the others ended after {seconds:.1f} s")
    os.kill(workers[rank], signal.SIGKILL)  # torchrun would do so 30 s after its SIGTERM
    done = job.finish(since)
    assert seconds > TIMEOUT - 1
    assert done.returncode != 0
    error = only_error(done.stderr, "ProcessLost")
    assert re.search(f"waited longer than engine.timeout_s={TIMEOUT} for {awaited}", error), error
    assert f"No sign of life from: {name}." in error


STEPS = 40
RESTARTED = (*TWO_STAGES, f"train.steps={STEPS}", "train.checkpoint_every_steps=5")
RESTARTED = (*RESTARTED, "train.eval_every_steps=10", "data.num_workers=1")


@pytest.fixture(scope="module")
def whole(sample_root, tmp_path_factory):
    """The folder of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    words = (*RESTARTED, "engine.name=torch", f"data.root={sample_root}", f"run.dir={folder}")
    assert train.main(list(words)) == 0
    return folder


@needs_pipelining
def test_restarted_job_resumes_from_its_last_checkpoint(launched, sample_root, tmp_path, whole):
    settings = (*RESTARTED, f"data.root={sample_root}", f"run.root={tmp_path}", "run.name=again")
    job = launched(2, "train.py", *settings, more=["--max-restarts", "2"])
    job.wait_for(lambda: any(saved_step(folder) >= 5 for folder in saved_runs(tmp_path)))
    job.signal(1, signal.SIGKILL)
    done = job.finish()
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert done.stdout.splitlines().count(str(folder)) == 2
    assert "from step" in done.stdout
    assert done.stderr.count("ProcessLost: ") == 1
    compare(folder, whole)


def saved_runs(root: Path) -> List[Path]:
    return [path.parents[2] for path in root.glob("*/checkpoints/last/trainer_state.json")]


def compare(folder: Path, other: Path) -> None:
    """Assert that a run that was killed has the losses of an uninterrupted one."""
    assert losses(folder) == pytest.approx(losses(other), rel=0, abs=1e-5)
    assert tensorboard_steps(folder) == list(range(1, STEPS + 1))
    assert saved_step(folder) == STEPS


@pytest.mark.exhaustive
@needs_pipelining
def test_job_killed_before_its_first_checkpoint_starts_again(
    launched, sample_root, tmp_path, whole
):
    folder = tmp_path / "run"
    settings = (*RESTARTED, f"data.root={sample_root}", *NO_VALIDATION, f"run.dir={folder}")
    job = launched(2, "train.py", *settings, more=["--max-restarts", "2"])
    job.wait_for_step(folder, 3)
    job.signal(0, signal.SIGKILL)
    done = job.finish()
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert done.stdout.splitlines().count(str(folder)) == 2
    assert not (folder / ".lock").exists()
    compare(folder, whole)


def one_of_two_hosts(port: int, *arguments) -> subprocess.Popen:
    """Start a torchrun with one process that waits for another torchrun."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    more = ["--nnodes", "2", *rendezvous, "--max-restarts", "2"]
    return start(1, "train.py", *arguments, more=more)


@pytest.mark.exhaustive
@needs_pipelining
def test_two_hosts_restart_together(launched, sample_root, tmp_path, whole):
    """Only the host whose process was killed counts a restart."""
    port = free_port()
    settings = (*RESTARTED, f"data.root={sample_root}", f"run.root={tmp_path}")
    hosts = [launched(port, *settings, begin=one_of_two_hosts) for _ in range(2)]
    for host in hosts:
        host.wait_for(lambda: any(saved_step(folder) >= 5 for folder in saved_runs(tmp_path)))
    (second,) = [host for host in hosts if rank_of(host.workers()[0]) == 1]
    second.signal(0, signal.SIGKILL)
    done = [host.finish() for host in hosts]
    assert [host.returncode for host in done] == [0, 0], [host.stderr for host in done]
    (folder,) = tmp_path.iterdir()
    compare(folder, whole)


ATTEMPTS = ["--max-restarts", "1"]


@pytest.mark.exhaustive
def test_used_run_folder_is_refused_in_every_attempt(launched, sample_root, tmp_path):
    """A refused attempt leaves no run to resume."""
    folder = tmp_path / "run"
    settings = (*SMALL, f"data.root={sample_root}", f"run.dir={folder}", "train.steps=3")
    run(None, "train.py", *settings)
    before = content(folder)
    settings = (*REPLICAS, f"data.root={sample_root}", f"run.dir={folder}")
    done = launched(2, "train.py", *settings, more=ATTEMPTS).finish()
    assert done.returncode != 0
    assert done.stderr.count(f"ConfigError: run.dir={folder} exists and is not empty") == 2
    assert done.stderr.count("Error: ") - done.stderr.count("ChildFailedError: ") == 2
    assert content(folder) == before


@pytest.mark.exhaustive
def test_missing_data_are_reported_alike_in_every_attempt(launched, tmp_path):
    """The first attempt removes the folder it made, so there is no run to resume."""
    settings = (*REPLICAS, f"data.root={tmp_path / 'nowhere'}", f"run.root={tmp_path / 'runs'}")
    done = launched(2, "train.py", *settings, more=ATTEMPTS).finish()
    assert done.returncode != 0
    assert done.stderr.count("DataError: ") == 2, done.stderr
    assert "FileNotFoundError" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.exhaustive
def test_ctrl_c_saves_and_stops_all_processes(launched, sample_root, tmp_path):
    """The terminal signals its foreground group, and torchrun passes the signal on."""
    settings = (*REPLICAS, f"data.root={sample_root}", LONG, f"run.dir={tmp_path}")
    job = launched(2, "train.py", *settings, "data.num_workers=1")
    job.wait_for_step(tmp_path, 2)
    job.workers()
    os.killpg(job.process.pid, signal.SIGINT)
    done = job.finish(since=time.monotonic())
    assert done.returncode != 0
    assert_stopped(done.stdout, tmp_path, "SIGINT received")
    stopped = saved_step(tmp_path)
    done = run(2, "train.py", "--resume", tmp_path, f"train.steps={stopped + 2}")
    assert f"from step {stopped}" in done.stdout
    assert list(losses(tmp_path)) == list(range(1, stopped + 3))


@pytest.mark.exhaustive
@needs_pipelining
def test_early_stopping_stops_all_processes(launched, sample_root, tmp_path):
    patience = ("train.early_stopping_patience=1", "train.eval_every_steps=1", "optim.lr=1e-20")
    settings = (*TWO_STAGES, f"data.root={sample_root}", LONG, *patience, f"run.dir={tmp_path}")
    done = launched(2, "train.py", *settings).finish()
    assert done.returncode == 0, done.stderr
    assert_stopped(done.stdout, tmp_path, "early stopping: 1 validations")
    assert error_lines(done.stderr) == [], done.stderr


@pytest.mark.exhaustive
@needs_pipelining
def test_non_finite_loss_is_reported_once(launched, sample_root, tmp_path):
    settings = (*TWO_STAGES, f"data.root={sample_root}", LONG, "optim.lr=1e30")
    done = launched(2, "train.py", *settings, f"run.dir={tmp_path}").finish()
    assert done.returncode != 0
    assert "No checkpoint was written yet." in only_error(done.stderr, "NonFiniteLoss")


class Stopped(NamedTuple):
    """A run of two processes on new synthetic images, one of which gets SIGTERM."""

    rank: int
    done: subprocess.CompletedProcess
    folder: Path
    images: Path


@pytest.fixture(scope="module", params=[0, exhaustive(1)])
def stopped(request, tmp_path_factory):
    """The main process, the only one that prints and writes, is late.

    It is the last to reach the images, and still writes when the other process is done.
    """
    place = tmp_path_factory.mktemp("stopped")
    folder, images = place / "run", place / "new" / "images"
    settings = (*REPLICAS, LONG, *NO_VALIDATION, f"run.dir={folder}")
    settings = (*settings, f"data.root={images}", "data.sample_images=60")
    with jobs() as launch:
        job = launch(2, FAILING, "slow_start+slow_disk", 0, *settings)
        job.wait_for_step(folder, 2)
        done = job.finish(since=job.signal(request.param, signal.SIGTERM))
    return Stopped(request.param, done, folder, images)


def test_signal_to_one_process_saves_and_stops_all(stopped):
    done = stopped.done
    assert done.returncode != 0
    assert "exitcode  : 75" in done.stderr, done.stderr
    assert error_lines(done.stderr) == [], done.stderr
    reason = "SIGTERM received" if stopped.rank == 0 else "another process was interrupted"
    assert_stopped(done.stdout, stopped.folder, reason)


def test_files_and_output_are_written_once(stopped):
    done, folder = stopped.done, stopped.folder
    steps = list(range(1, saved_step(folder) + 1))
    assert list(losses(folder)) == tensorboard_steps(folder) == steps
    (events,) = folder.glob("events.*")
    names = {"config.yaml", "environment.json", "metrics.jsonl", events.name, "checkpoints"}
    assert {path.name for path in folder.iterdir()} == names
    lines = done.stdout.splitlines()
    assert lines[0] == str(folder)
    stages = [line for line in lines if line.startswith("Encoder")]
    assert len(set(lines)) == len(lines) and len(stages) == 4, done.stdout
    assert all(done.stderr.count(f"step {step}/100000 ") == 1 for step in steps), done.stderr


def test_synthetic_data_set_and_cache_are_made_once(stopped):
    done, images = stopped.done, stopped.images
    assert done.stderr.count(f"data.root={images} does not exist: writing a synthetic") == 1
    assert done.stderr.count("INFO: cached 60 images in ") == 1, done.stderr
    assert "60 images of" in done.stdout
    assert len(list(images.rglob("*.png"))) == 60
