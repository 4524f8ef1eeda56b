"""What becomes of a run of several processes when one of them fails, hangs or is told to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Set

import pytest
from conftest import SMALL

from cxr_vit.synthetic.dataset import write_sample

from .launch import HAS_PIPELINING, ROOT, command, finish, free_port, needs_pipelining, run, start

pytestmark = pytest.mark.slow


def ALL(value):  # noqa: N802  (reads as a word in the lists of cases)
    """Try this case only in `make test-all`: every start of processes takes some ten seconds."""
    return pytest.param(value, marks=pytest.mark.exhaustive)


#: A job that fails is to be over within so many seconds.
SOON = 30

#: Wrapped around train.py, with a fault in one process.
FAILING = "tests/engines/processes/failing.py"

MORE = ("batch.gradient_accumulation=4", "train.log_every_steps=1")
LONG = "train.steps=100000"
NO_VALIDATION = ("train.eval_every_steps=100000", "train.checkpoint_every_steps=100000")
#: Three processes, a stage each; the middle one has two layers.
PIPELINE = (*SMALL, *MORE, "engine.name=pipeline", "pipeline.layers_per_stage=[1, 2, 1]")
#: Two processes.
TWO_STAGES = (*SMALL, *MORE, "engine.name=pipeline", "pipeline.layers_per_stage=[2, 2]")
#: Two processes, a replica each.
REPLICAS = (*SMALL, *MORE, "engine.name=torch", "batch.replicas=2")

#: Lines of stderr that tell no error: ours, and torchrun's.
QUIET = re.compile(
    r"step \d|INFO: |WARNING: |$|\[?[IW]\d{4} |(INFO|WARNING):torch\.distributed"
    r"|master_addr is only used"
)
#: Where torchrun begins its own report of what failed.
TORCHRUN = re.compile(r"E\d{4} |ERROR:torch\.distributed\.elastic")


# Looking at processes


def parents() -> Dict[int, int]:
    """Return process -> parent of all processes that run; zombies do not."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended
            continue
        if state != "Z":
            found[int(folder.name)] = int(parent)
    return found


def descendants(process: int) -> Set[int]:
    found, new = set(), {process}
    every = parents()
    while new:
        found |= new
        new = {child for child, parent in every.items() if parent in new} - found
    return found


def rank_of(process: int) -> Optional[int]:
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [variable for variable in variables if variable.startswith(b"RANK=")]
    return int(ranks[0].partition(b"=")[2]) if ranks else None


def state_of(process: int) -> str:
    return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0]


def skip_without_pipelining() -> None:
    if not HAS_PIPELINING:
        pytest.skip("torch.distributed.pipelining comes with torch 2.6")


class Job:
    """A torchrun with its processes, all of which are gone after the test."""

    def __init__(self, torchrun: subprocess.Popen) -> None:
        self.torchrun = torchrun
        self.everyone: Set[int] = set()

    def workers(self) -> List[int]:
        """Return the processes that torchrun started, by rank."""
        self.everyone |= descendants(self.torchrun.pid)
        every = parents()
        mine = [child for child, parent in every.items() if parent == self.torchrun.pid]
        ranks = {rank_of(child): child for child in mine}
        return [ranks[rank] for rank in sorted(rank for rank in ranks if rank is not None)]

    def wait_for(self, what: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.torchrun.poll() is None, self.torchrun.communicate()
            assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
            time.sleep(0.02)

    def wait_for_step(self, folder: Path, step: int) -> None:
        self.wait_for(lambda: any(done >= step for done in losses(folder)))

    def signal(self, rank: int, number: int) -> float:
        """Send a signal to one process; return the moment."""
        os.kill(self.workers()[rank], number)
        return time.monotonic()

    def finish(self, since: Optional[float] = None) -> subprocess.CompletedProcess:
        """Wait for the end, which comes soon after a moment, and leaves no process."""
        done = finish(self.torchrun)
        if since is not None:
            seconds = time.monotonic() - since
            print(f"over after {seconds:.1f} s")
            assert seconds < SOON, done.stderr
        deadline = time.monotonic() + SOON
        while self.left():  # a loader looks for its parent every few seconds
            assert time.monotonic() < deadline, f"still there: {self.left()}"
            time.sleep(0.1)
        return done

    def left(self) -> Set[int]:
        return self.everyone & set(parents())

    def clean_up(self) -> None:
        if self.torchrun.poll() is None:
            self.workers()
            self.torchrun.kill()
        for process in self.left():
            os.kill(process, signal.SIGKILL)
        self.torchrun.wait()
        for stream in (self.torchrun.stdout, self.torchrun.stderr):
            stream.close()


@pytest.fixture
def launched():
    """Start jobs; no process of theirs outlives the test."""
    jobs: List[Job] = []

    def launch(*arguments, begin=start, **named) -> Job:
        jobs.append(Job(begin(*arguments, **named)))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.clean_up()


# Looking at what they left


def losses(folder: Path) -> Dict[int, float]:
    """Return step -> loss of a run; each step is there once."""
    if not (folder / "metrics.jsonl").exists():
        return {}
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    found = [(event["step"], event["train/loss"]) for event in events if "train/loss" in event]
    assert len(dict(found)) == len(found), found
    return dict(found)


def curve_of_tensorboard(folder: Path) -> List[int]:
    """Return the steps of the loss that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def saved_step(folder: Path) -> int:
    text = (folder / "checkpoints" / "last" / "trainer_state.json").read_text()
    return json.loads(text)["step"]


def content(folder: Path) -> Dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(errors: str) -> List[str]:
    """Return the lines of stderr that tell an error, up to torchrun's own report."""
    found = []
    for line in errors.splitlines():
        if TORCHRUN.match(line):
            break
        if not QUIET.match(line):
            found.append(line)
    return found


def the_error(errors: str, kind: str) -> str:
    """Return the one line that tells an error; it is told first and once."""
    lines = told(errors)
    assert len(lines) == 1 and lines[0].startswith(f"{kind}: "), errors
    assert errors.count(f"{kind}: ") == 1, errors
    return lines[0]


# A process is killed, raises, or is wrong


@needs_pipelining
@pytest.mark.parametrize("rank", [ALL(0), 1, ALL(2)])
def test_a_killed_stage_ends_all_and_is_named(launched, sample_root, tmp_path, rank):
    job = launched(
        3, "train.py", *PIPELINE, f"data.root={sample_root}", LONG, f"run.dir={tmp_path}"
    )
    job.wait_for_step(tmp_path, 4)
    done = job.finish(since=job.signal(rank, signal.SIGKILL))
    assert done.returncode != 0
    error = the_error(done.stderr, "ProcessLost")
    assert f"No sign of life from: stage {rank} (process {rank})." in error
    assert "lost the connection" in error and "--max-restarts" in error


@pytest.mark.parametrize("rank", [ALL(0), ALL(1)])
def test_a_killed_replica_ends_all_and_is_named(launched, sample_root, tmp_path, rank):
    job = launched(
        2, "train.py", *REPLICAS, f"data.root={sample_root}", LONG, f"run.dir={tmp_path}"
    )
    job.wait_for_step(tmp_path, 4)
    done = job.finish(since=job.signal(rank, signal.SIGKILL))
    assert done.returncode != 0
    assert f"No sign of life from: process {rank}." in the_error(done.stderr, "ProcessLost")


@needs_pipelining
def test_an_error_that_one_process_meets_is_told_by_it_alone(launched, tmp_path):
    """Only the first stage reads images, and they break when the run is under way."""
    root, folder = tmp_path / "images", tmp_path / "run"
    write_sample(root, num_images=80, image_size=32, seed=0)
    settings = (*PIPELINE, f"data.root={root}", "data.cache=off", LONG, f"run.dir={folder}")
    job = launched(3, "train.py", *settings)
    job.wait_for_step(folder, 2)
    broken = time.monotonic()
    for image in root.rglob("*.png"):
        image.write_bytes(image.read_bytes()[:100])
    done = job.finish(since=broken)
    assert done.returncode != 0
    assert ".png" in the_error(done.stderr, "DataError")
    assert "exitcode  : 2" in done.stderr


@pytest.mark.exhaustive
@needs_pipelining
def test_a_bug_in_one_process_is_told_with_one_traceback(launched, sample_root, tmp_path):
    settings = (*PIPELINE, f"data.root={sample_root}", LONG, f"run.dir={tmp_path}")
    job = launched(3, FAILING, "bug", 2, *settings)
    job.wait_for_step(tmp_path, 3)
    done = job.finish(since=time.monotonic())
    assert done.returncode != 0
    lines = told(done.stderr)
    assert lines[0] == "Traceback (most recent call last):", done.stderr
    assert lines[-1] == "ZeroDivisionError: a bug of ours", done.stderr
    assert "\n".join(lines).count("Traceback") == 1, done.stderr
    assert done.stderr.count("\nZeroDivisionError") == 1 and "ProcessLost" not in done.stderr


IN_SHORT = {"too few processes"}
ONE_STAGE_EACH = ("engine.name=pipeline", "pipeline.layers_per_stage=[2, 2]")
MISTAKES = {
    "misspelt": (2, ("optim.learning_rate=1",), ["Did you mean 'optim.lr'?"]),
    "too few micro-batches": (
        2,
        (*ONE_STAGE_EACH, "batch.gradient_accumulation=1"),
        ["batch.gradient_accumulation=1 is less than the 2 stages"],
    ),
    "too few processes": (2, ("engine.name=pipeline",), ["needs 4 processes", "there are 2"]),
    "not a process a replica": (
        2,
        ("engine.name=torch",),
        ["batch.replicas=1", "torchrun started 2 processes"],
    ),
    "one process": (None, ONE_STAGE_EACH, ["needs 2 processes", "there is 1"]),
}


@pytest.mark.parametrize(
    "mistake", ["too few processes", *map(ALL, sorted(set(MISTAKES) - IN_SHORT))]
)
def test_a_mistake_is_told_once_and_leaves_nothing(launched, sample_root, tmp_path, mistake):
    processes, settings, words = MISTAKES[mistake]
    if "misspelt" not in mistake and "torch" not in settings[0]:
        skip_without_pipelining()
    settings = (*SMALL, f"data.root={sample_root}", *settings, f"run.root={tmp_path / 'runs'}")
    job = launched(processes, "train.py", *settings)
    done = job.finish(since=time.monotonic())
    assert done.returncode == (2 if processes is None else 1)
    error = the_error(done.stderr, "ConfigError")
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("runs/*"))


# A process does not answer

#: Seconds; no less than the processes' starts may lie apart on a machine that is busy.
TIMEOUT = 10
#: Processes, settings, which of them stops, how it is called, and what the others wait for.
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


@pytest.mark.parametrize("case", ["1f1b", *map(ALL, sorted(set(SILENT) - {"1f1b"}))])
def test_a_silent_process_is_named_after_the_timeout(launched, sample_root, tmp_path, case):
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
    job = launched(processes, FAILING, "silence", rank, *settings, LONG, *NO_VALIDATION)
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
    error = the_error(done.stderr, "ProcessLost")
    assert re.search(f"waited longer than engine.timeout_s={TIMEOUT} for {awaited}", error), error
    assert f"No sign of life from: {name}." in error


# torchrun starts them anew

STEPS = 40
RESTARTED = (*TWO_STAGES, f"train.steps={STEPS}", "train.checkpoint_every_steps=5")
RESTARTED = (*RESTARTED, "train.eval_every_steps=10", "data.num_workers=1")


@pytest.fixture(scope="module")
def whole(sample_root, tmp_path_factory):
    """A run that nothing interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(2, "train.py", *RESTARTED, f"data.root={sample_root}", f"run.dir={folder}")


@needs_pipelining
def test_everything_is_written_and_printed_once(whole):
    folder, done = whole
    assert list(losses(folder)) == list(range(1, STEPS + 1))
    assert curve_of_tensorboard(folder) == list(range(1, STEPS + 1))
    assert len(list((folder / "tensorboard").iterdir())) == 1
    names = {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    assert {path.name for path in folder.iterdir()} == names
    lines = done.stdout.splitlines()
    assert lines[0] == str(folder)
    stages = [line for line in lines if line.startswith("Encoder")]
    assert len(set(lines)) == len(lines) and len(stages) == 4, done.stdout
    assert all(done.stderr.count(f"step {n}/{STEPS} ") == 1 for n in range(1, STEPS + 1))
    assert told(done.stderr) == [], done.stderr


@needs_pipelining
def test_a_job_started_anew_goes_on_from_its_last_checkpoint(
    launched, sample_root, tmp_path, whole
):
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
    compare(folder, whole[0])


def saved_runs(root: Path) -> List[Path]:
    return [path.parents[2] for path in root.glob("*/checkpoints/last/trainer_state.json")]


def compare(folder: Path, other: Path) -> None:
    """Hold the losses of a run that was killed against those of one that was not."""
    assert losses(folder) == pytest.approx(losses(other), rel=0, abs=1e-5)
    assert curve_of_tensorboard(folder) == list(range(1, STEPS + 1))
    assert saved_step(folder) == STEPS


@pytest.mark.exhaustive
@needs_pipelining
def test_a_job_killed_before_its_first_checkpoint_begins_anew(
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
    compare(folder, whole[0])


def one_of_two_hosts(port: int, *arguments) -> subprocess.Popen:
    """Start a torchrun with one process that looks for another torchrun."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    words = command(
        1, "train.py", *arguments, more=["--nnodes", "2", *meeting, "--max-restarts", "2"]
    )
    return subprocess.Popen(
        words,
        cwd=str(ROOT),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.exhaustive
@needs_pipelining
def test_two_hosts_start_anew_together(launched, sample_root, tmp_path, whole):
    """Only the host whose process was killed counts that as a restart."""
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
    compare(folder, whole[0])


ATTEMPTS = ["--max-restarts", "1"]


@pytest.mark.exhaustive
def test_another_run_is_refused_in_every_attempt(launched, sample_root, tmp_path):
    """An attempt that was refused is no run to go on with."""
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
def test_a_mistake_in_the_data_is_told_alike_in_every_attempt(launched, tmp_path):
    """The first attempt removes the folder it made: there is no run to go on with."""
    settings = (*REPLICAS, f"data.root={tmp_path / 'nowhere'}", f"run.root={tmp_path / 'runs'}")
    done = launched(2, "train.py", *settings, more=ATTEMPTS).finish()
    assert done.returncode != 0
    assert done.stderr.count("DataError: ") == 2, done.stderr
    assert "FileNotFoundError" not in done.stderr
    assert not list((tmp_path / "runs").iterdir())


# Signals, and ends that all agree on


def resume(folder: Path, steps: int, processes: int = 2) -> None:
    """Go on with a stopped run for so many steps."""
    stopped = saved_step(folder)
    assert list(losses(folder)) == list(range(1, stopped + 1))
    done = run(processes, "train.py", "--resume", folder, f"train.steps={stopped + steps}")
    assert f"from step {stopped}" in done.stdout
    assert list(losses(folder)) == list(range(1, stopped + steps + 1))


def stopped_at(done: subprocess.CompletedProcess, folder: Path, reason: str) -> None:
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("stopped at")]
    assert line.startswith(f"stopped at step {saved_step(folder)}: {reason}"), line


@needs_pipelining
def test_sigterm_to_torchrun_saves_and_stops_all(launched, sample_root, tmp_path):
    settings = (*TWO_STAGES, f"data.root={sample_root}", LONG, f"run.dir={tmp_path}")
    job = launched(2, "train.py", *settings)
    job.wait_for_step(tmp_path, 2)
    job.workers()
    job.torchrun.terminate()
    done = job.finish(since=time.monotonic())
    assert done.returncode != 0
    stopped_at(done, tmp_path, "SIGTERM received")
    resume(tmp_path, 2)


@pytest.mark.exhaustive
def test_ctrl_c_saves_and_stops_all(launched, sample_root, tmp_path):
    """The terminal signals its whole foreground group, and torchrun passes the signal on."""
    settings = (*REPLICAS, f"data.root={sample_root}", LONG, f"run.dir={tmp_path}")
    job = launched(2, "train.py", *settings, "data.num_workers=1")
    job.wait_for_step(tmp_path, 2)
    job.workers()
    os.killpg(job.torchrun.pid, signal.SIGINT)
    done = job.finish(since=time.monotonic())
    assert done.returncode != 0
    stopped_at(done, tmp_path, "SIGINT received")
    resume(tmp_path, 2)


@pytest.mark.parametrize("rank", [0, ALL(1)])
def test_a_signal_to_one_process_saves_and_stops_all(launched, sample_root, tmp_path, rank):
    """Even if the first is still writing when the others are done."""
    settings = (*REPLICAS, f"data.root={sample_root}", LONG, f"run.dir={tmp_path}")
    job = launched(2, FAILING, "slow_disk", 0, *settings, *NO_VALIDATION)
    job.wait_for_step(tmp_path, 2)
    done = job.finish(since=job.signal(rank, signal.SIGTERM))
    assert done.returncode != 0
    assert "exitcode  : 75" in done.stderr, done.stderr
    assert told(done.stderr) == [], done.stderr
    reason = "SIGTERM received" if rank == 0 else "another process was told to stop"
    stopped_at(done, tmp_path, reason)
    assert list(losses(tmp_path)) == list(range(1, saved_step(tmp_path) + 1))


@pytest.mark.exhaustive
@needs_pipelining
def test_early_stopping_stops_all(launched, sample_root, tmp_path):
    patience = ("train.early_stopping_patience=1", "train.eval_every_steps=1", "optim.lr=1e-20")
    settings = (*TWO_STAGES, f"data.root={sample_root}", LONG, *patience, f"run.dir={tmp_path}")
    done = launched(2, "train.py", *settings).finish()
    assert done.returncode == 0, done.stderr
    stopped_at(done, tmp_path, "early stopping: 1 validations")
    assert told(done.stderr) == [], done.stderr


@pytest.mark.exhaustive
@needs_pipelining
def test_a_loss_that_is_not_finite_is_told_once(launched, sample_root, tmp_path):
    settings = (*TWO_STAGES, f"data.root={sample_root}", LONG, "optim.lr=1e30")
    done = launched(2, "train.py", *settings, f"run.dir={tmp_path}").finish()
    assert done.returncode != 0
    assert "No checkpoint was written yet." in the_error(done.stderr, "NonFiniteLoss")


def test_one_synthetic_data_set_and_one_cache_are_made(launched, tmp_path):
    """Also if the first process, which alone prints, comes last."""
    root = tmp_path / "new" / "images"
    settings = (
        *REPLICAS,
        f"data.root={root}",
        "data.sample_images=60",
        f"run.dir={tmp_path / 'run'}",
    )
    job = launched(2, FAILING, "late", 0, *settings)
    done = job.finish()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"data.root={root} does not exist: writing a synthetic") == 1
    assert done.stderr.count("INFO: cached 60 images in ") == 1, done.stderr
    assert "60 images of" in done.stdout
    assert len(list(root.rglob("*.png"))) == 60
