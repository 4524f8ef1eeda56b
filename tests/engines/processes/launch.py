"""Start train.py or evaluate.py in several processes, as a user does: with torchrun, on gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

HAS_PIPELINING = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
needs_pipelining = pytest.mark.skipif(
    not HAS_PIPELINING, reason="the pipeline engine needs torch 2.10"
)


def free_port() -> int:
    """Return a port nobody listens on; torch 2.0's --standalone always takes the same."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def command(
    processes: Optional[int], program: str, *arguments: Any, more: Sequence[str] = ()
) -> list:
    """Write the command line; None is one process without torchrun, `more` is for torchrun."""
    if processes is None:
        return [sys.executable, str(ROOT / program), *map(str, arguments)]
    return [
        *[sys.executable, "-m", "torch.distributed.run"],
        *["--master-addr", "127.0.0.1", "--master-port", str(free_port())],
        *["--nproc-per-node", str(processes), *more],
        *[str(ROOT / program), *map(str, arguments)],
    ]


def start(
    processes: Optional[int], program: str, *arguments: Any, more: Sequence[str] = ()
) -> subprocess.Popen:
    """Start it, in a process group of its own."""
    return subprocess.Popen(
        command(processes, program, *arguments, more=more),
        cwd=str(ROOT),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Wait for the end. If it does not come, tell torchrun, which ends its processes."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # its processes have sessions of their own
        output, errors = process.communicate(timeout=60)
        raise AssertionError(f"did not end in {timeout} s:\n{output}\n{errors}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(processes: Optional[int], program: str, *arguments: Any, more: Sequence[str] = ()):
    """Run it to its end, which must be a success."""
    done = finish(start(processes, program, *arguments, more=more))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done
