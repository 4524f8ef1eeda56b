"""Callbacks of the runs of benchmarks.cpu: what is other than usual, and stamps of time."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any, Callable, Dict

import torch

from benchmarks.throughput_worker import Paced
from cxr_vit import Callback, ViTModule


def _plain_adamw(trainer: Any) -> None:
    for group in trainer.engine.optimizer.param_groups:
        group["fused"] = False


def _channels_last(trainer: Any) -> None:
    trainer.module.model.to(memory_format=torch.channels_last)


#: What is set before a thread or a kernel begins, and what is changed in the engine.
SETTINGS: Dict[str, Callable[[], Any]] = {
    "flush_denormal": lambda: torch.set_flush_denormal(True),
    "without_mkldnn": lambda: torch.backends.mkldnn.set_flags(False),
    "matmul_medium": lambda: torch.set_float32_matmul_precision("medium"),
}
CHANGES: Dict[str, Callable[[Any], None]] = {
    "plain_adamw": _plain_adamw,
    "channels_last": _channels_last,
}


class Altered(Paced):
    """Paces a run of `train.py` that has the setting or the change `alters` of its task."""

    def __init__(self, task: str) -> None:
        super().__init__(task)
        SETTINGS.get(self.task["alters"], lambda: None)()

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Change the engine."""
        CHANGES.get(self.task["alters"], lambda trainer: None)(trainer)


class Stamps(Callback):
    """Writes when each part of the start was over, and ends the run after its first step.

    The stamps are seconds since the epoch, but `warm_up_s` and the processor time `cpu_s`.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.stamps = {"imported": time.time()}
        setup = ViTModule.setup

        @functools.wraps(setup)
        def stamped(module: ViTModule, *arguments: Any, **named: Any) -> None:
            self.stamps.setdefault("data", time.time())
            setup(module, *arguments, **named)

        setattr(ViTModule, "setup", stamped)  # noqa: B010 -- mypy refuses another signature

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Note that the model and the engine are built."""
        self.stamps["built"] = time.time()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Note that the logs are open and the first batch is there."""
        self.stamps["begun"] = time.time()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the stamps and end the run."""
        self.stamps.update(done=time.time(), warm_up_s=trainer.compile_s, cpu_s=time.process_time())
        self.out.write_text(json.dumps(self.stamps), encoding="utf-8")
        trainer.request_stop("the benchmark is over")
