"""Start train.py or evaluate.py in several processes, as a user does: with torchrun, on gloo."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
#: Seconds within which a job that fails must end.
SOON = 30

HAS_PIPELINING = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
needs_pipelining = pytest.mark.skipif(
    not HAS_PIPELINING, reason="the pipeline engine needs torch 2.10"
)


def free_port() -> int:
    """Return a free port; --standalone of torch 2.0 always uses the same one."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def command(
    processes: Optional[int], program: str, *arguments: Any, more: Sequence[str] = ()
) -> list:
    """Return the command line; None processes means no torchrun, `more` is for torchrun."""
    if processes is None:
        return [sys.executable, str(ROOT / program), *map(str, arguments)]
    return [
        *[sys.executable, "-m", "torch.distributed.run"],
        *["--master-addr", "127.0.0.1", "--master-port", str(free_port())],
        *["--nproc-per-node", str(processes), *more],
        *[str(ROOT / program), *map(str, arguments)],
    ]


def start_command(words: Sequence[str]) -> subprocess.Popen:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        list(words),
        cwd=str(ROOT),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start(
    processes: Optional[int], program: str, *arguments: Any, more: Sequence[str] = ()
) -> subprocess.Popen:
    """Start the program in several processes."""
    return start_command(command(processes, program, *arguments, more=more))


def fork(processes: int, *program: Any) -> subprocess.Popen:
    """Start a program in several processes that are forked after the imports; see forking.py."""
    forking = ROOT / "tests" / "engines" / "processes" / "forking.py"
    return start_command([sys.executable, *map(str, (forking, processes, *program))])


def finish(process: subprocess.Popen, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Wait for the end; after the timeout terminate torchrun, which ends its processes."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # its processes have sessions of their own
        output, errors = process.communicate(timeout=60)
        raise AssertionError(f"did not end in {timeout} s:\n{output}\n{errors}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(processes: Optional[int], program: str, *arguments: Any, more: Sequence[str] = ()):
    """Run the program to its end and assert success."""
    done = finish(start(processes, program, *arguments, more=more))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def parents() -> Dict[int, int]:
    """Return process -> parent of all running processes; zombies are left out."""
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
    """Return a process and its children, grandchildren and so on."""
    found, new = set(), {process}
    all_parents = parents()
    while new:
        found |= new
        new = {child for child, parent in all_parents.items() if parent in new} - found
    return found


def rank_of(process: int) -> Optional[int]:
    """Return the RANK that torchrun gave to a process."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [variable for variable in variables if variable.startswith(b"RANK=")]
    return int(ranks[0].partition(b"=")[2]) if ranks else None


class Job:
    """A torchrun (or a single train.py) and its processes."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.seen: Set[int] = set()

    def workers(self) -> List[int]:
        """Return the processes that torchrun started, by rank."""
        self.seen |= descendants(self.process.pid)
        children = [child for child, parent in parents().items() if parent == self.process.pid]
        ranks = {rank_of(child): child for child in children}
        return [ranks[rank] for rank in sorted(rank for rank in ranks if rank is not None)]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
            time.sleep(0.02)

    def wait_for_step(self, folder: Path, step: int) -> None:
        self.wait_for(lambda: any(done >= step for done in losses(folder)))

    def signal(self, rank: int, number: int) -> float:
        """Send a signal to one process; return the time."""
        os.kill(self.workers()[rank], number)
        return time.monotonic()

    def terminate(self) -> float:
        """Send SIGTERM to torchrun; return the time."""
        self.process.terminate()
        self.workers()  # after the signal, so that no further step passes
        return time.monotonic()

    def finish(self, since: Optional[float] = None) -> subprocess.CompletedProcess:
        """Wait for the end of all processes, which must come soon after `since`."""
        done = finish(self.process)
        if since is not None:
            seconds = time.monotonic() - since
            print(f"ended after {seconds:.1f} s")
            assert seconds < SOON, done.stderr
        deadline = time.monotonic() + SOON
        while self.left():  # a loader looks for its parent every few seconds
            assert time.monotonic() < deadline, f"still running: {self.left()}"
            time.sleep(0.1)
        return done

    def left(self) -> Set[int]:
        """Return the processes of the job that still run."""
        return self.seen & set(parents())

    def clean_up(self) -> None:
        """Kill what is left."""
        if self.process.poll() is None:
            self.workers()
            self.process.kill()
        for process in self.left():
            os.kill(process, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()


@contextlib.contextmanager
def jobs() -> Iterator[Callable[..., Job]]:
    """Yield a function that starts jobs; none of their processes survives the block."""
    started: List[Job] = []

    def launch(*arguments: Any, begin: Callable[..., subprocess.Popen] = start, **named: Any):
        started.append(Job(begin(*arguments, **named)))
        return started[-1]

    try:
        yield launch
    finally:
        for job in started:
            job.clean_up()


def events(folder: Path) -> List[Dict[str, Any]]:
    """Return the lines of metrics.jsonl, without a last line that is not complete."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> Dict[int, float]:
    """Return step -> training loss of a run, in which each step is logged once."""
    found = [
        (event["step"], event["train/loss"]) for event in events(folder) if "train/loss" in event
    ]
    assert len(dict(found)) == len(found), found
    return dict(found)


def saved_step(folder: Path) -> int:
    """Return the step of a run's last checkpoint."""
    text = (folder / "checkpoints" / "last" / "trainer_state.json").read_text()
    return int(json.loads(text)["step"])


def assert_stopped(output: str, folder: Path, reason: str) -> None:
    """Assert that a run was saved where it stopped, and that it printed why."""
    (line,) = [line for line in output.splitlines() if line.startswith("stopped at")]
    assert line.startswith(f"stopped at step {saved_step(folder)}: {reason}"), line
    assert list(losses(folder)) == list(range(1, saved_step(folder) + 1))
