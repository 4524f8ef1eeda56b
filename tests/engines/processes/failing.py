"""Run train.py with a fault in one of the processes.

torchrun tests/engines/processes/failing.py FAULT[+FAULT] RANK ARGUMENTS
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import train
from cxr_vit import cli


def bug() -> None:
    """Raise an unexpected error in the fourth update."""
    from cxr_vit.engines.pipeline_engine import PipelineEngine

    clip = PipelineEngine.clip_gradients

    def broken(engine):
        if engine.updates == 3:
            raise ZeroDivisionError("a bug of ours")
        return clip(engine)

    PipelineEngine.clip_gradients = broken


def silence() -> None:
    """Stop in the middle of a training step, like a host that hangs."""
    from cxr_vit.model.stages import Stage

    forward, calls = Stage.forward, itertools.count()

    def silent(stage, value, paths):
        if stage.training and next(calls) == 29:
            os.kill(os.getpid(), signal.SIGSTOP)
        return forward(stage, value, paths)

    Stage.forward = silent


def slow_disk() -> None:
    """Take seconds to write a file of weights."""
    from cxr_vit.training import checkpoint

    save = checkpoint.save_file

    def slowly(*arguments, **named):
        time.sleep(2)
        save(*arguments, **named)

    checkpoint.save_file = slowly


def slow_start() -> None:
    """Reach the data set last."""
    from cxr_vit.data.synthetic import dataset

    write = dataset.write_sample_if_absent

    def slowly(data):
        time.sleep(3)
        write(data)

    dataset.write_sample_if_absent = slowly


if __name__ == "__main__":
    faults, rank = sys.argv.pop(1), sys.argv.pop(1)
    # As cli.run does, but before a fault imports the model.
    warnings.filterwarnings("ignore", message="The torchvision.datapoints")
    if os.environ["RANK"] == rank:
        for fault in faults.split("+"):
            globals()[fault]()
    cli.run(train.main)
