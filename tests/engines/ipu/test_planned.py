"""The memory check of train.py before it compiles, and the plan in TensorBoard."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from cxr_vit.errors import ConfigError

from .commands import IPU, messages

#: ViT-B on two IPUs in fp32: 343 MB of weights, 1.4 GB with gradients and moments.
TOO_LARGE = (
    *("model.name=vit-base", "model.patch_size=16", "pipeline.layers_per_stage=[6,6]"),
    *("batch.micro_batch_size=64", "batch.eval_device_iterations=2"),
)


def test_strict_run_stops_before_reading_or_compiling(ipu, commands, said):
    with pytest.raises(ConfigError, match=r"does not fit.*planner.strict=true stops here"):
        commands.train(*IPU, *TOO_LARGE, "planner.strict=true", folder="strict")
    assert not (commands.folder / "strict").exists(), "an empty run leaves no folder"
    assert ipu[1].log().calls("compiled") == []


def test_strict_compile_only_stops_before_compiling(ipu, commands, said):
    cache = f"engine.executable_cache={commands.folder / 'cache'}"
    words = commands.overrides(*IPU, *TOO_LARGE, cache, "planner.strict=true")
    with pytest.raises(ConfigError, match=r"planner\.strict=true stops here"):
        train.main(["--config", str(commands.file), *words, "--compile-only"])
    assert ipu[1].log().calls("compiled") == []


def test_a_run_that_fits_is_quiet_and_shows_its_plan(ipu, commands, said):
    run = commands.train(*IPU, "loggers=[tensorboard, jsonl]")
    assert run.status == 0
    assert not [message for message in messages(said) if "predicted memory" in message]
    board = EventAccumulator(str(run.path), size_guidance={"images": 0})
    board.Reload()
    assert {"plan/timeline", "plan/memory"} <= set(board.Tags()["images"])
