"""Runs that are killed or stopped at random moments end equal to an uninterrupted run.

Equal are the SHA-256 of weights and optimizer, which checkpoint is the best, and the metrics, each
step once. Times are drawn uniformly over the time that the uninterrupted run takes from its first
line of Python to its end; after a kill the same command, or `--resume`, continues the run.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

import pytest
from processes.launch import HAS_PIPELINING, descendants, free_port, parents

from cxr_vit.checkpoint_files import has_checkpoints

from .forking import Process, Server
from .runs import TRAINING, Outcome, environment, outcome

#: Exit status of a run that was stopped and saved.
STOPPED = 75
#: A loader process of a killed run notices within 5 seconds and holds the lock until then.
WITH_WORKER = "data.num_workers=1"


class Whole(NamedTuple):
    """The uninterrupted run, and how long it took."""

    outcome: Outcome
    seconds: float


Start = Callable[[Sequence[str], Path], Process]


def kill_and_resume(
    start: Start,
    given: Sequence[str],
    folder: Path,
    whole: Whole,
    chance: random.Random,
    *,
    kills: int,
    kill: Callable[[Process, random.Random], None],
) -> int:
    """Run to the end with at most `kills` kills on the way; return how many there were."""
    done = leg = 0
    while True:
        process = start(next_words(given, folder, chance), folder.parent / f"output_{leg}")
        leg += 1
        if done < kills:
            ended = wait(process, chance.uniform(0, whole.seconds))
            if ended is None:
                kill(process, chance)
                status = process.wait()
                done += status != 0
                continue
        status = process.wait(300)
        assert status == 0, process.text
        break
    assert outcome(folder) == whole.outcome
    legs = [folder.parent / f"output_{number}" for number in range(leg)]
    text = "".join(path.read_text(errors="replace") for path in legs)
    # torchrun prints a traceback of its own where a process is killed.
    assert not re.search(r'File "[^"]*/(cxr_vit/|train\.py)', text), text
    assert not re.search(r"damaged|passing over", text), text
    return done


def next_words(given: Sequence[str], folder: Path, chance: random.Random) -> List[str]:
    """Return the command line with which a user goes on after a kill."""
    resume = ["--resume", str(folder)]
    if has_checkpoints(folder):
        return resume
    # Before the first checkpoint both are right; without config.yaml only the same command is.
    has_config = (folder / "config.yaml").exists()
    return resume if has_config and chance.random() < 0.5 else list(given)


def wait(process: Process, seconds: float) -> Optional[int]:
    """Wait this long after the start; return the exit status if the process has ended."""
    deadline = process.started + seconds
    while time.monotonic() < deadline:
        status = process.poll()
        if status is not None:
            return status
        time.sleep(min(0.005, max(0.0, deadline - time.monotonic())))
    return process.poll()


def kill_one_or_all(process: Process, chance: random.Random) -> None:
    process.signal(signal.SIGKILL, group=chance.random() < 0.5)


@pytest.fixture(scope="module")
def given(cached_root):
    """Overrides of the run; the folder is missing."""
    return ["--config", "vit_demo", *TRAINING, f"data.root={cached_root}"]


@pytest.fixture(scope="module")
def whole(server, given, tmp_path_factory):
    """The uninterrupted run; the cache is built before its time is taken."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("first", "second"):
        run = folder / name
        process = server.start([*given, f"run.dir={run}"], folder / f"{name}.txt")
        assert process.wait() == 0, process.text
        seconds = time.monotonic() - process.started
    assert outcome(folder / "first") == outcome(folder / "second")
    return Whole(outcome(run), seconds)


def killed_runs(start: Start, given, tmp_path, whole, *, kills: int, seed: int) -> int:
    """Make runs, each killed several times, until there were `kills` kills."""
    chance, done, number = random.Random(seed), 0, 0
    while done < kills:
        folder = tmp_path / str(number) / "run"
        folder.parent.mkdir()
        words = [*given, f"run.dir={folder}"]
        if number % 5 == 4:
            words.append(WITH_WORKER)
        at_most = min(kills - done, 6)
        done += kill_and_resume(
            start, words, folder, whole, chance, kills=at_most, kill=kill_one_or_all
        )
        number += 1
    print(f"{done} kills in {number} runs")
    return done


def test_killed_run_ends_equal(server, given, tmp_path, whole):
    assert killed_runs(server.start, given, tmp_path, whole, kills=2, seed=0) == 2


@pytest.mark.faults
def test_run_killed_50_times_ends_equal(server, given, tmp_path, whole):
    assert killed_runs(server.start, given, tmp_path, whole, kills=50, seed=1) == 50


# As a script, with the imports


class Script(Process):
    """A program that is started as a user starts it."""

    def __init__(self, words: Sequence[str], output: Path) -> None:
        import subprocess

        with output.open("w") as file:
            self._popen = subprocess.Popen(
                list(words),
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        super().__init__(self._popen.pid, output)

    def poll(self) -> Optional[int]:
        return self._popen.poll()


def script(words: Sequence[str], output: Path) -> Process:
    return Script([sys.executable, "train.py", *words], output)


@pytest.mark.faults
def test_script_killed_10_times_ends_equal(given, tmp_path, whole):
    run = tmp_path / "timed"
    process = script([*given, f"run.dir={run}"], tmp_path / "timed.txt")
    assert process.wait() == 0, process.text
    timed = whole._replace(seconds=time.monotonic() - process.started)
    assert outcome(run) == whole.outcome
    assert killed_runs(script, given, tmp_path, timed, kills=10, seed=2) == 10


# A pipeline of four processes


def torchrun(words: Sequence[str], output: Path) -> Process:
    command = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "--nproc-per-node", "4", "train.py"]
    return Script([*command, *words], output)


def kill_a_rank_or_all(process: Process, chance: random.Random) -> None:
    """Kill torchrun with its processes, or one of these, which ends the others."""
    family = descendants(process.pid)
    ranks = sorted(family - {process.pid})
    victims = family if chance.random() < 0.5 or not ranks else {chance.choice(ranks)}
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (family - {process.pid}) & set(parents()) or process.poll() is None:
        assert time.monotonic() < deadline, process.text
        time.sleep(0.05)


@pytest.mark.faults
@pytest.mark.skipif(not HAS_PIPELINING, reason="the pipeline engine needs torch 2.10")
def test_pipeline_of_four_processes_killed_20_times_ends_equal(given, tmp_path, whole):
    pipeline = [*given, "engine.name=pipeline", "batch.gradient_accumulation=4"]
    pipeline += ["batch.micro_batch_size=2", "engine.timeout_s=60"]
    run = tmp_path / "timed" / "run"
    run.parent.mkdir()
    process = torchrun([*pipeline, f"run.dir={run}"], tmp_path / "timed.txt")
    assert process.wait(300) == 0, process.text
    seconds = time.monotonic() - process.started
    timed = Whole(outcome(run), seconds)
    chance, done, number = random.Random(3), 0, 0
    while done < 20:
        folder = tmp_path / str(number) / "run"
        folder.parent.mkdir()
        words = [*pipeline, f"run.dir={folder}"]
        at_most = min(20 - done, 5)
        done += kill_and_resume(
            torchrun, words, folder, timed, chance, kills=at_most, kill=kill_a_rank_or_all
        )
        number += 1
    print(f"{done} kills in {number} runs")


# Signals

SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]
#: A validation that takes a second, to be stopped within.
SLOW_VALIDATION = "callbacks=[{class: faults.callbacks.SlowValidation}]"


def begun(process: Process, folder: Path, text: str, seconds: float = 60) -> None:
    """Wait until the output of the process holds a text."""
    deadline = time.monotonic() + seconds
    while text not in process.text:
        assert process.poll() is None and time.monotonic() < deadline, process.text
        time.sleep(0.005)


def stop_and_resume(server: Server, words, folder: Path, whole: Whole, stop: Callable[..., Any]):
    """Start, call `stop` when training has begun, expect status 75, resume, compare."""
    process = server.start(words, folder.parent / "stopped.txt")
    begun(process, folder, "step 1/")
    stop(process)
    status = process.wait(60)
    assert status == STOPPED, f"{status}\n{process.text}"
    assert any((folder / "checkpoints").glob("step_*"))
    again = ["--resume", str(folder), "callbacks=[]"]
    process = server.start(again, folder.parent / "resumed.txt")
    assert process.wait(60) == 0, process.text
    assert outcome(folder) == whole.outcome


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.faults) for name in SIGNALS],
)
def test_signal_saves_and_the_resumed_run_ends_equal(server, given, tmp_path, whole, name):
    chance = random.Random(name)

    def stop(process: Process) -> None:
        time.sleep(chance.uniform(0, 0.2))
        process.signal(getattr(signal, name))

    folder = tmp_path / "run"
    stop_and_resume(server, [*given, f"run.dir={folder}"], folder, whole, stop)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.faults) for name in SIGNALS],
)
def test_signal_within_a_validation_is_heeded_there(server, given, tmp_path, whole, name):
    seconds = []

    def stop(process: Process) -> None:
        begun(process, folder, "validating")
        process.signal(getattr(signal, name))
        begun_at = time.monotonic()
        process.wait(60)
        seconds.append(time.monotonic() - begun_at)
        assert "validated" not in process.text, "the validation was finished first"

    folder = tmp_path / "run"
    words = [*given, f"run.dir={folder}", SLOW_VALIDATION]
    stop_and_resume(server, words, folder, whole, stop)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.faults] * (name != "SIGTERM")) for name in SIGNALS],
)
def test_second_signal_ends_the_run_at_once(server, given, tmp_path, whole, name):
    folder = tmp_path / "run"
    words = [*given, f"run.dir={folder}", "callbacks=[{class: faults.callbacks.LongStep}]"]
    process = server.start(words, tmp_path / "stopped.txt")
    begun(process, folder, "a long step")
    process.signal(getattr(signal, name))
    begun(process, folder, "second signal")
    assert process.poll() is None
    if name == "SIGHUP":  # the system and the shell both send one
        process.signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        name = "SIGTERM"
    process.signal(getattr(signal, name))
    status = process.wait(10)
    # KeyboardInterrupt of a second SIGINT is a status; the others end the process themselves.
    assert status in (-getattr(signal, name), 128 + getattr(signal, name)), process.text
