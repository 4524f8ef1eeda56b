"""allgather through files: each process writes its part and waits for those of the others."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

_calls = 0


def init() -> None:
    pass


def allgather(part: torch.Tensor) -> torch.Tensor:
    global _calls
    folder = Path(os.environ["EXCHANGE_FOLDER"])
    index, count = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    temporary = folder / f"{_calls}.{index}.writing"
    torch.save(part, str(temporary))
    temporary.replace(folder / f"{_calls}.{index}")
    parts = [_wait_for(folder / f"{_calls}.{other}") for other in range(count)]
    _calls += 1
    return torch.cat(parts)


def _wait_for(path: Path) -> torch.Tensor:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody wrote {path}"
        time.sleep(0.01)
    part: torch.Tensor = torch.load(str(path))
    return part
