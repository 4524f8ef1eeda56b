"""The constants refitted to runs: made ones whose truth is known, and real ones."""

import json
import math

import pytest

import train
from cxr_vit.config import dump_config
from cxr_vit.errors import ConfigError
from cxr_vit.planner.calibrate import calibrate, calibration_lines, config_of_run
from cxr_vit.planner.estimate import make_plan
from cxr_vit.planner.hardware import HARDWARE
from cxr_vit.planner.speed import SpeedModel, published_model, workload

from .shapes import pod4

MK2 = HARDWARE["mk2"]
TRUE = SpeedModel(start_cycles=1e6, efficiency=0.3, basis="")


def write_run(folder, config, events, device="poptorch engine on 4 IPUs (1 x 4 stages)"):
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "environment.json").write_text(json.dumps({"device": device}))
    lines = [json.dumps({"step": step, **event}) for step, event in enumerate(events)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"half of a li']))
    return folder


def made_run(folder, *overrides, wait_pct=20.0):
    """A run as fast as TRUE says, a fifth of whose time went into waiting for data."""
    config = pod4(*overrides)
    work = workload(config, MK2)
    speed = work.samples / work.seconds(TRUE) * (1 - wait_pct / 100)
    event = {"perf/samples_per_s": speed, "perf/data_wait_pct": wait_pct}
    slow = {"perf/samples_per_s": speed / 9, "perf/data_wait_pct": 0.0}  # the first, warming up
    return write_run(folder, config, [{"perf/compile_s": 9.0}, slow, event, event, {"val/loss": 1}])


def test_runs_of_unlike_micro_batches_give_both_constants(tmp_path):
    runs = [
        made_run(tmp_path / f"micro{size}", f"batch.micro_batch_size={size}") for size in (1, 8)
    ]
    found = calibrate(runs)
    assert found.before is published_model(MK2)
    assert found.after.start_cycles == pytest.approx(TRUE.start_cycles, rel=1e-6)
    assert found.after.efficiency == pytest.approx(TRUE.efficiency, rel=1e-6)
    assert found.after.basis == "fitted to micro1, micro8"
    for run in found.runs:
        assert run.work.seconds(found.after) == pytest.approx(run.seconds)


def test_the_table_shows_predicted_against_measured(tmp_path):
    run = made_run(tmp_path / "mine")
    found = calibrate([run])
    text = "\n".join(calibration_lines(found))
    measured = found.runs[0].work.samples / found.runs[0].seconds
    assert measured == pytest.approx(128 / workload(pod4(), MK2).seconds(TRUE))
    for words in ("mine", f"{measured:,.1f}", "477.7", "+0.0 %", "poptorch engine on 4 IPUs"):
        assert words in text


def test_a_devices_own_clock_wins(tmp_path):
    events = [{"perf/samples_per_s": 1.0, "perf/ipu_cycles": 1.325e9 * 2}] * 2
    run = write_run(tmp_path / "run", pod4("batch.device_iterations=4"), events)
    assert calibrate([run]).runs[0].seconds == pytest.approx(0.5)


def test_a_real_run_is_predicted_by_its_own_constants(tmp_path, small_overrides):
    """Two runs of the torch engine on this CPU fit the constants; a third is foretold by them."""

    def run(size):
        folder = tmp_path / f"micro{size}"
        assert train.main([*small_overrides, *settings(size), f"run.dir={folder}"]) == 0
        return folder

    def settings(size):
        return (
            *("train.steps=8", "train.log_every_steps=1", "engine.name=torch"),
            *("batch.gradient_accumulation=1", f"batch.micro_batch_size={size}"),
        )

    found = calibrate([run(2), run(32)])
    assert [run.device.split(" (")[0] for run in found.runs] == ["torch engine on CPU in fp32"] * 2
    # This machine is noisy, and the table's GPU is a thousand times as fast.
    for own in (*found.runs, *calibrate([run(12)]).runs):
        off = [
            abs(math.log(own.work.seconds(model) / own.seconds))
            for model in (found.before, found.after)
        ]
        assert off[1] < 0.7 * off[0], own.name
    config = config_of_run(tmp_path / "micro12")
    assert make_plan(config, model=found.after).model is found.after


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "config.yaml").unlink(), "it has no config.yaml"),
        (lambda run: (run / "environment.json").write_text("{}"), "does not say what it ran on"),
        (lambda run: (run / "environment.json").write_text("[]"), "does not say what it ran on"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no perf/samples_per_s"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}'), "no perf/samples_per_s"),
    ],
)
def test_a_folder_that_is_no_run_is_told(tmp_path, spoil, words):
    run = made_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(ConfigError, match=words):
        calibrate([run])


def test_lines_that_are_no_events_are_passed_over(tmp_path):
    run = made_run(tmp_path / "run")
    whole = calibrate([run]).after
    spoilt = (
        '3\n[]\n{"perf/samples_per_s": null}\n{"perf/samples_per_s": 0}\n'
        '{"perf/samples_per_s": 9, "perf/data_wait_pct": 100}\n'
    )
    half = '{"perf/samples_per_s": 1, "a": "\u00e9'.encode()[:-1]
    log = (spoilt + (run / "metrics.jsonl").read_text() + "\n").encode() + half
    (run / "metrics.jsonl").write_bytes(log)
    assert calibrate([run]).after == whole


def test_a_run_faster_than_the_device_can_be_is_refused(tmp_path):
    events = [{"perf/samples_per_s": 1e9}] * 2
    with pytest.raises(ConfigError, match="less than Mk2 IPU"):
        calibrate([write_run(tmp_path / "run", pod4(), events)])
    events = [{"perf/samples_per_s": 60_000.0}] * 2
    fast = write_run(tmp_path / "fast", pod4("batch.micro_batch_size=16"), events)
    with pytest.raises(ConfigError, match=r"% of the peak of Mk2 IPU.*another device"):
        calibrate([fast])


def test_a_run_of_unlike_stages_reproduces_itself(tmp_path):
    config = pod4(
        "engine.name=pipeline",
        "pipeline.layers_per_stage=[6,2,2,2]",
        "pipeline.recompute=every_layer",
        "batch.micro_batch_size=16",
    )
    device = "pipeline engine on NVIDIA A100 in 4 processes (1 x 4 stages, 1f1b) in fp16 (...)"
    run = write_run(tmp_path / "run", config, [{"perf/samples_per_s": 500.0}] * 2, device)
    found = calibrate([run])
    assert found.runs[0].work.samples / found.runs[0].work.seconds(found.after) == pytest.approx(
        500
    )


def test_the_arithmetic_is_that_of_the_run_and_not_auto(tmp_path):
    event = [{"perf/samples_per_s": 5.0}] * 2
    device = "torch engine on CPU in fp32 (engine.name=torch; no CUDA device answers)"
    run = write_run(tmp_path / "run", pod4("engine.precision=auto"), event, device)
    assert config_of_run(run).engine.precision == "fp32"
    assert calibrate([run]).runs[0].work.precision == "fp32"


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        calibrate([tmp_path / "nowhere"])


def test_runs_of_unlike_devices_are_not_mixed(tmp_path):
    ipu = made_run(tmp_path / "ipu")
    event = {"perf/samples_per_s": 5.0}
    cpu, gpu = (
        write_run(tmp_path / name, pod4(), [event], device=f"torch engine on {name} in fp32 (...)")
        for name in ("CPU", "NVIDIA H100")
    )
    for other in (ipu, gpu):
        with pytest.raises(ConfigError, match="one device has one set of constants"):
            calibrate([other, cpu])
