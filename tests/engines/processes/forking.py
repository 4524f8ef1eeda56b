"""Start processes as torchrun does, with the imports of all of them made once.

python tests/engines/processes/forking.py PROCESSES PROGRAM ARGUMENTS

PROGRAM is a file, or -m and a module. This is for tests of what the processes compute; those of how
they start, fail and end use torchrun. As torchrun's agent, this process holds the store and
terminates the other processes when one fails.
"""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any, List, Sequence

ROOT = Path(__file__).resolve().parents[3]


def import_all() -> None:
    """Import what a run imports."""
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.vit.modeling_vit  # noqa: F401

    import cxr_vit
    import cxr_vit.commands.callbacks
    from cxr_vit.engines import torch_engine

    with contextlib.suppress(ImportError):  # torch 2.0 has no pipelining
        from cxr_vit.engines import pipeline_engine  # noqa: F401
    assert cxr_vit.Trainer and cxr_vit.ViTModule and torch_engine


def run(words: Sequence[str], rank: int, processes: int, port: int) -> None:
    """Run the program as one of the processes."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(sys.argv[0], run_name="__main__")


def wait_for(pids: List[int]) -> int:
    """Wait for the processes; terminate the others and return 1 if one fails."""
    failed = 0
    try:
        while pids:
            pid, status = os.wait()
            pids.remove(pid)
            if status and not failed:
                failed = 1
                end(pids)
    finally:
        end(pids)
    return failed


def end(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGTERM)


def stop(*_: Any) -> None:
    sys.exit(1)


def main() -> int:
    processes, words = int(sys.argv[1]), sys.argv[2:]
    sys.path[0] = str(ROOT)
    import_all()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    gc.freeze()  # of no interest to the garbage collection of any process
    pids: List[int] = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            run(words, rank, processes, port)
            return 0
        pids.append(pid)
    signal.signal(signal.SIGTERM, stop)
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, None, is_master=True, wait_for_workers=False)
    status = wait_for(pids)
    del store
    return status


if __name__ == "__main__":
    sys.exit(main())
