"""Start `train` in a process group of its own without the seconds that its imports take.

A server imports the package once and forks a process per command line. The process runs the command
as train.py does, from its first line of Python on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, List, Optional, Sequence

from .runs import environment

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A `train` in its own process group, whose output goes to a file."""

    def __init__(self, pid: int, output: Path, server: Optional[Server] = None) -> None:
        self.pid = pid
        self.output = output
        self.started = time.monotonic()
        self._server = server
        self._status: Optional[int] = None

    @property
    def text(self) -> str:
        """Its stdout and stderr so far."""
        if not self.output.exists():  # it has just been forked
            return ""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> Optional[int]:
        """Return the exit status, negative for a signal, or None while it runs."""
        if self._status is None and self._server is not None:
            self._status = self._server.status(self.pid)
        return self._status

    def wait(self, seconds: float = 120) -> int:
        """Return the exit status; kill the process group after the timeout."""
        deadline = time.monotonic() + seconds
        while True:
            status = self.poll()
            if status is not None:
                return status
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL, group=True)
                raise AssertionError(f"did not end in {seconds} s:\n{self.text}")
            time.sleep(0.01)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to all of its group (its loader workers)."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)


class Server:
    """Forks processes that have the imports of `train` already."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.forking"],
            cwd=str(ROOT),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._ask([]) == 0, "the server did not start"

    def start(self, words: Sequence[str], output: Path) -> Process:
        """Run `train` with the words of a command line."""
        return Process(self._ask(["start", str(output), *words]), output, self)

    def status(self, pid: int) -> Optional[int]:
        """Return how a process ended, or None while it runs."""
        answer: Optional[int] = self._ask(["status", pid])
        return answer

    def close(self) -> None:
        """End the server; every process it started has ended."""
        _pipe(self._process.stdin).close()
        self._process.wait(30)
        _pipe(self._process.stdout).close()

    def _ask(self, request: List[Any]) -> Any:
        pipe = _pipe(self._process.stdin)
        pipe.write(json.dumps(request) + "\n")
        pipe.flush()
        return json.loads(_pipe(self._process.stdout).readline())


def _pipe(pipe: Optional[IO[str]]) -> IO[str]:
    assert pipe is not None
    return pipe


def _run(words: Sequence[str], output: str) -> None:
    """Be the process: run the command and exit with its status."""
    from cxr_vit.cli import run
    from cxr_vit.commands.train import main

    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # a job in the background ignores some
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    sys.argv = [str(ROOT / "train.py"), *words]
    run(main)


def serve() -> None:
    """Answer requests, one JSON list a line."""
    import cxr_vit
    import cxr_vit.commands.callbacks

    # Imports of the first run.
    assert cxr_vit.Trainer and cxr_vit.ViTModule
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.vit.modeling_vit  # noqa: F401

    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        answer: Optional[int] = 0
        if request and request[0] == "start":
            answer = os.fork()
            if answer == 0:
                _run(request[2:], request[1])
        elif request:
            answer = _ended(request[1])
        print(json.dumps(answer), flush=True)


def _ended(pid: int) -> Optional[int]:
    """Return the exit status of a child, negative for a signal, or None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if not found:
        return None
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


if __name__ == "__main__":
    serve()
    os._exit(0)  # at once: torch's end takes seconds
