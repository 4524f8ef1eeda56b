"""A run of a few seconds that ends equal, bit for bit, however it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

#: Overrides of a model of two layers on images of 32 pixels; data.root and run.dir are missing.
SMALL: Tuple[str, ...] = (
    "model.name=vit-micro",
    "model.patch_size=16",
    "data.image_size=32",
    "data.val_fraction=0.2",
    "pipeline.layers_per_stage=[1, 1, 1, 1]",
    "batch.micro_batch_size=4",
    "batch.gradient_accumulation=2",
    "batch.eval_micro_batch_size=1",
    "engine.device=cpu",
    "engine.precision=fp32",
)
#: A checkpoint every 3 steps, a validation every 6, in 24 steps.
STEPS = 24
TRAINING = (
    *SMALL,
    f"train.steps={STEPS}",
    "train.log_every_steps=1",
    "train.eval_every_steps=6",
    "train.checkpoint_every_steps=3",
    "loggers=[jsonl]",
)


class Outcome(NamedTuple):
    """What must be equal: digests of the last checkpoint and the best one, and the metrics."""

    last: Dict[str, str]
    best: Dict[str, str]
    best_step: str
    events: List[Dict[str, Any]]


def outcome(run: Path) -> Outcome:
    """Return what a finished run has."""
    last, best = (named_checkpoint(run, name) for name in ("last", "best"))
    return Outcome(digests(last), digests(best), best.name, events(run))


def named_checkpoint(run: Path, name: str) -> Path:
    """Return the checkpoint that `last` or `best` names: a link, or a text file without links."""
    path = run / "checkpoints" / name
    if path.is_file():
        return path.parent / path.read_text(encoding="utf-8").strip()
    return path.resolve()


def digests(checkpoint: Path) -> Dict[str, str]:
    """Return the SHA-256 of weights and optimizer."""
    return {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    }


def events(run: Path) -> List[Dict[str, Any]]:
    """Return the lines of metrics.jsonl without times and speeds; each step once."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    found = []
    for line in text.splitlines():
        event = {
            tag: value for tag, value in json.loads(line).items() if not tag.startswith("perf/")
        }
        if len(event) > 1:
            found.append(event)
    return found


def environment() -> Dict[str, str]:
    """Return the variables of a process that finds this package and its callbacks."""
    tests = Path(__file__).resolve().parents[1]
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
