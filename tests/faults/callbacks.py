"""Callbacks that the tests name in a configuration."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from cxr_vit import Callback

from .guard import memory_mib


class LongStep(Callback):
    """The third step takes a minute."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs.step == 3:
            print("a long step", flush=True)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # a signal ends one sleep only
                time.sleep(0.01)


class SlowValidation(Callback):
    """A batch of a validation takes half a second."""

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        predict = trainer.engine.predict

        def slow(batch: Any) -> Any:
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline:
                time.sleep(0.01)
            return predict(batch)

        trainer.engine.predict = slow
        print("validating", flush=True)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        print("validated", flush=True)


class Soak(Callback):
    """Writes memory, open files and threads after each validation to a file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        files = len(list(Path("/proc/self/fd").iterdir()))
        line = f"{trainer.global_step} {memory_mib('VmRSS')} {files} {threading.active_count()}\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)


class FullDisk(Callback):
    """Fills the file system of the run at one step and makes room at a later one."""

    def __init__(self, fill: int, free: int) -> None:
        self.fill = fill
        self.free = free

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        ballast = trainer.run.path.parent / "ballast"
        if trainer.global_step == self.fill:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    return
        elif trainer.global_step == self.free:
            ballast.unlink()
