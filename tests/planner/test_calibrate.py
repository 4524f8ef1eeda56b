"""Constants fitted to runs: made ones whose constants are known, and real ones."""

import json
import math

import pytest

import train
from cxr_vit.config import dump_config
from cxr_vit.errors import ConfigError
from cxr_vit.planner.calibrate import calibrate, calibration_lines, config_of_run
from cxr_vit.planner.estimate import make_plan
from cxr_vit.planner.hardware import SPEED_UNCERTAINTY, find_target
from cxr_vit.planner.speed import RELATIVE, Constants, workload

from .shapes import BOW, MK2, MK2_MODEL, gpu4, pod4

TRUE = Constants(overhead_s=0.75e-3, flops_per_s=75e12)


def facts(name="poptorch", device="IPU", precision="fp16"):
    return {
        "name": name,
        "device": device,
        "precision": precision,
        "processes": 1,
        "replicas": 1,
        "stages": 4,
    }


def write_run(folder, config, events, engine=None):
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "environment.json").write_text(json.dumps({"engine": engine or facts()}))
    lines = [json.dumps({"step": step, **event}) for step, event in enumerate(events)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"half of a li']))
    return folder


def made_run(folder, *overrides, wait_pct=20.0):
    """Write a run with the speed of TRUE, which waited for data a fifth of the time."""
    config = pod4(*overrides)
    work = workload(config, MK2)
    speed = work.batch.global_batch_size / work.seconds(TRUE) * (1 - wait_pct / 100)
    event = {"perf/samples_per_s": speed, "perf/data_wait_pct": wait_pct}
    slow = {"perf/samples_per_s": speed / 9, "perf/data_wait_pct": 0.0}  # the first, warming up
    return write_run(folder, config, [{"perf/compile_s": 9.0}, slow, event, event, {"val/loss": 1}])


def made_runs(folder, *sizes):
    return [made_run(folder / f"micro{n}", f"batch.micro_batch_size={n}") for n in sizes]


def gpu_run(folder, *overrides, speed=500.0, **engine):
    """Write a run of the pipeline engine on GPUs with a given speed."""
    engine = {"name": "pipeline", "device": "NVIDIA A100", "precision": "bf16", **engine}
    event = {"perf/samples_per_s": speed}
    return write_run(folder, gpu4(*overrides), [event] * 2, facts(**engine))


def test_three_micro_batch_sizes_determine_both_constants(tmp_path):
    found = calibrate(made_runs(tmp_path, 1, 4, 8))
    assert found.before is MK2_MODEL
    assert found.after.constants == pytest.approx(TRUE, rel=1e-6)
    assert found.after.basis == "2 constants fitted to 3 runs (micro1, micro4, micro8)"
    for _, work, seconds, _ in found.runs:
        assert work.seconds(found.after.constants) == pytest.approx(seconds)


def test_two_micro_batch_sizes_determine_one_factor(tmp_path):
    runs = made_runs(tmp_path, 1, 8)
    found = calibrate(runs)
    assert found.after.basis == "1 constant fitted to 2 runs (micro1, micro8)"
    residuals = [
        abs(work.seconds(found.after.constants) / seconds - 1) for _, work, seconds, _ in found.runs
    ]
    assert found.after.error == max(residuals) > SPEED_UNCERTAINTY
    for _, work, seconds, _ in found.runs:
        shortest_s, longest_s = found.after.range_s(work)
        assert shortest_s * (1 - 1e-9) <= seconds <= longest_s * (1 + 1e-9)


def test_table_compares_measured_with_predicted(tmp_path):
    found = calibrate([made_run(tmp_path / "mine")])
    text = "\n".join(calibration_lines(found))
    _, work, seconds, _ = found.runs[0]
    speed = 128 / seconds
    assert seconds == pytest.approx(work.seconds(TRUE))
    for words in ("mine", f"{speed:,.1f}", "477.7", "engine poptorch on Mk2 IPU", "5.0 %"):
        assert words in text
    assert "0.0 %" not in text.replace("5.0 %", ""), "one factor always meets one run"
    two = "\n".join(calibration_lines(calibrate(made_runs(tmp_path, 1, 8))))
    assert "+" in two and "-" in two


def test_cycle_count_of_the_device_wins(tmp_path):
    events = [{"perf/samples_per_s": 1.0, "perf/ipu_cycles": 1.325e9 * 2}] * 2
    run = write_run(tmp_path / "run", pod4("batch.device_iterations=4"), events)
    assert calibrate([run]).runs[0].seconds == pytest.approx(0.5)


def test_scatter_of_a_run_is_part_of_the_error(tmp_path):
    events = [{"perf/samples_per_s": speed} for speed in (1, 100, 200, 300)]
    found = calibrate([write_run(tmp_path / "run", pod4(), events)])
    assert found.runs[0].scatter == pytest.approx(1 / 3)
    assert found.after.error == pytest.approx(1 / 3)


def test_real_runs_predict_each_other(tmp_path, small_overrides):
    """Two runs of the torch engine on this CPU predict the speed of a third."""

    def run(size):
        folder = tmp_path / f"micro{size}"
        settings = [
            "train.steps=8",
            "train.log_every_steps=1",
            "engine.name=torch",
            "engine.device=cpu",
            "engine.precision=fp32",
            "batch.gradient_accumulation=1",
            f"batch.micro_batch_size={size}",
        ]
        assert train.main([*small_overrides, *settings, f"run.dir={folder}"]) == 0
        return folder

    found = calibrate([run(2), run(32)])
    assert found.before is RELATIVE
    assert [run.work.target.describe() for run in found.runs] == ["engine torch on CPU in fp32"] * 2
    (third,) = calibrate([run(12)]).runs
    config = config_of_run(tmp_path / "micro12")
    plan = make_plan(config, target=found.target_for(find_target(config)), model=found.after)
    assert plan.has_time
    # This machine may be busy.
    assert abs(math.log(plan.seconds / third.seconds)) < math.log(5)
    low, high = plan.speed_range
    assert low < plan.samples_per_s < high


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "config.yaml").unlink(), "it has no config.yaml"),
        (lambda run: (run / "environment.json").unlink(), "missing or unreadable"),
        (lambda run: (run / "environment.json").write_text("{"), "missing or unreadable"),
        (lambda run: (run / "environment.json").write_text("{}"), "written by an older version"),
        (lambda run: (run / "environment.json").write_text("[]"), "written by an older version"),
        (
            lambda run: (run / "environment.json").write_text(
                '{"device": "torch engine on CPU in fp32 (engine.name=torch)"}'
            ),
            "written by an older version",
        ),
        (lambda run: (run / "metrics.jsonl").unlink(), "no perf/samples_per_s"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}'), "no perf/samples_per_s"),
    ],
)
def test_folder_without_a_usable_run_is_refused(tmp_path, spoil, words):
    run = made_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(ConfigError, match=words):
        calibrate([run])


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        calibrate([tmp_path / "nowhere"])


def test_lines_without_a_speed_are_ignored(tmp_path):
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


def test_run_faster_than_the_ipu_is_refused(tmp_path):
    events = [{"perf/samples_per_s": 1e9}] * 2
    with pytest.raises(ConfigError, match="less than Mk2 IPU"):
        calibrate([write_run(tmp_path / "run", pod4(), events)])
    events = [{"perf/samples_per_s": 60_000.0}] * 2
    fast = write_run(tmp_path / "fast", pod4("batch.micro_batch_size=16"), events)
    with pytest.raises(ConfigError, match=r"% of the peak of Mk2 IPU.*another device"):
        calibrate([fast])


def test_run_with_uneven_stages_is_met(tmp_path):
    cut = ["pipeline.layers_per_stage=[6,2,2,2]", "batch.gradient_accumulation=128"]
    found = calibrate([gpu_run(tmp_path / "run", *cut)])
    work = found.runs[0].work
    assert work.batch.global_batch_size / work.seconds(found.after.constants) == pytest.approx(500)


def test_engine_device_and_precision_are_those_of_the_run(tmp_path):
    run = gpu_run(tmp_path / "run", "engine.name=auto", "engine.device=auto")
    config = config_of_run(run)
    assert (config.engine.name, config.engine.device) == ("pipeline", "cuda")
    assert config.engine.precision == "bf16"
    cpu = gpu_run(tmp_path / "cpu", name="torch", device="CPU", precision="fp32")
    assert config_of_run(cpu).engine.device == "cpu"


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"name": "torch"}, "they differ in engine"),
        ({"device": "CPU"}, "they differ in device"),
        ({"device": "NVIDIA H100"}, "they differ in device"),
        ({"precision": "fp32"}, "they differ in precision"),
        ({"name": "torch", "device": "CPU"}, "they differ in engine, device"),
    ],
)
def test_runs_that_differ_are_refused_together(tmp_path, other, differing):
    runs = [gpu_run(tmp_path / "one"), gpu_run(tmp_path / "other", **other)]
    with pytest.raises(ConfigError, match=f"one is a run of .* and other of .*: {differing}"):
        calibrate(runs)


@pytest.mark.parametrize(
    ("overrides", "differing"),
    [
        ([], None),
        (["engine.precision=bf16"], None),
        (["engine.precision=fp16"], "they differ in precision"),
        (["engine.device=cpu"], "they differ in device"),
        (["engine.name=torch"], "they differ in engine"),
        (["planner.hardware=mk2"], "they differ in engine, device, precision"),
    ],
)
def test_runs_and_configuration_share_engine_device_and_precision(tmp_path, overrides, differing):
    found = calibrate([gpu_run(tmp_path / "one")])
    planned = find_target(gpu4(*overrides))
    if differing:
        with pytest.raises(ConfigError, match=f"is planned for .*: {differing}"):
            found.target_for(planned)
    else:
        target = found.target_for(planned)
        assert (target.name, target.precision) == ("NVIDIA A100", "bf16")


def test_another_gpu_in_this_machine_is_refused(tmp_path):
    found = calibrate([gpu_run(tmp_path / "one")])
    here = find_target(gpu4())._replace(name="NVIDIA H100")
    with pytest.raises(ConfigError, match=r"they differ in device.*planner.device_memory_gib"):
        found.target_for(here)


def test_runs_on_a_bow_are_named_by_the_override(tmp_path):
    (run,) = calibrate(made_runs(tmp_path, 1), ["planner.hardware=bow"]).runs
    assert run.work.target == BOW
