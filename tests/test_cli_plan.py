"""The command `python -m cxr_vit plan`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import train
from conftest import SMALL
from cxr_vit.cli import main
from cxr_vit.config import read_config
from cxr_vit.errors import ConfigError
from cxr_vit.planner import hardware
from cxr_vit.planner.estimate import make_plan

ROOT = Path(__file__).resolve().parents[1]
POD4 = ROOT / "configs" / "vit_pod4.yaml"
GPU4 = ROOT / "configs" / "vit_gpu4.yaml"
DEMO = ROOT / "configs" / "vit_demo.yaml"


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "_DRIVERS", ())


@pytest.fixture
def plan(capsys):
    """Run the command; return its lines."""

    def call(*arguments, config=POD4):
        files = ["--config", str(config)] if config else []
        capsys.readouterr()
        assert main(["plan", *files, *map(str, arguments)]) == 0
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def text(plan):
    """Run the command; return its output as one line."""
    return lambda *arguments, **keys: " ".join(" ".join(plan(*arguments, **keys)).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory, sample_root):
    """The folder of a run of the torch engine on this CPU."""
    folder = tmp_path_factory.mktemp("plan") / "run"
    settings = [
        "train.steps=4",
        "train.log_every_steps=1",
        "engine.name=torch",
        "engine.device=cpu",
        "engine.precision=fp32",
    ]
    assert train.main([*SMALL, f"data.root={sample_root}", *settings, f"run.dir={folder}"]) == 0
    return folder


def cells(lines, label):
    """Return the cells of a row, without its label."""
    row = next(line for line in lines if line.startswith(label))
    return row[len(label) :].split()


def test_all_predictions_are_printed(plan):
    lines = plan()
    predicted = make_plan(read_config([POD4]))
    assert "  IPU 0  embedding, layers 0 to 2" in lines
    assert "  IPU 3  layers 9 to 11, head" in lines
    assert cells(lines, "parameters, millions") == ["22.01", "21.26", "21.26", "21.28"]
    rows = {
        "weights": "weights",
        "gradient accumulators": "accumulators",
        "optimizer state, on chip": "optimizer",
        "activation stash": "stash",
        "live in backward": "live",
        "matmul temporaries": "temporaries",
        "input and output": "io",
        "code": "code",
        "tile imbalance": "imbalance",
        "total": "total",
        "headroom": "headroom",
    }
    for label, field in rows.items():
        values = [f"{getattr(stage.memory, field) / 1e6:.1f}" for stage in predicted.stages]
        assert cells(lines, label) == values, label
    assert cells(lines, "micro-batches held at a time") == ["7", "5", "3", "1"]
    assert cells(lines, "verdict (+- 10 %)") == ["fits"] * 4
    text = " ".join(" ".join(lines).split())
    for words in (
        "(an IPU has 940.6, or 897 MiB)",
        "134 pipeline cycles = 128 micro-batches + 7 pipeline stages - 1",
        "(6 fill, 122 steady, 6 drain)",
        "used 128/134, bubble 4.5 %",
        "IPU 0 is the slowest, 0.5 % over",
        "1.45 ms of each micro-batch are fixed overhead",
        "478 samples/s (325 to 901), predicted",
        "an epoch of 82,197 images (NIH's official list) takes 2.9 min",
        "must read 478 images/s and send 24.0 MB/s",
        "2 constants fitted to 2 published runs, so no third run checks them; nothing here was"
        " measured on your machine",
    ):
        assert words in text


def test_evaluation_is_planned_with_its_calls_cycles_and_memory(plan):
    lines = plan("batch.eval_micro_batch_size=8", "batch.eval_device_iterations=16")
    start = next(row for row, line in enumerate(lines) if line.startswith("memory of evaluation"))
    evaluation = lines[start:]
    assert cells(evaluation, "verdict (+- 10 %)") == ["fits"] * 4
    assert not any(line.startswith(("activation stash", "optimizer")) for line in evaluation)
    text = " ".join(" ".join(evaluation).split())
    for words in (
        "128 samples per host call = 8 micro-batch x 1 replicas x 16 device iterations",
        "Calls: 34, 1.0 s, for the 4,327 validation images and 200, 5.6 s, for the 25,596 test",
        "19 pipeline cycles = 16 micro-batches + 4 pipeline stages - 1 (3 fill, 13 steady, 3 drain)"
        "; used 16/19, bubble 15.8 %",
        "in evaluation, predicted: a forward pass is assumed to have 25.0 % of the overhead",
    ):
        assert words in text


def test_cut_and_reserved_ipus_of_evaluation_are_named(plan, text):
    printed = text("pipeline.eval_layers_per_stage=[6,6]", "batch.eval_replicas=4")
    assert "layers [6,6] in evaluation" in printed
    assert plan("pipeline.eval_layers_per_stage=[6,6]", "batch.eval_replicas=4")[0] == (
        "4 x Mk2 IPU (GC200), 8 reserved for evaluation: 1 replica of 4 stages"
    )
    assert "in evaluation" not in text(config=GPU4)


def test_what_is_not_counted_or_not_measured_is_said(text):
    fp32 = text()
    assert "casts not in these times: engine.weights=fp32 casts the weights" in fp32
    assert "0.035 ms of IPU 0 or more, 1.7 % of a micro-batch" in fp32
    fp16 = text("engine.weights=fp16", "pipeline.recompute=none")
    assert "casts" not in fp16
    assert "297.3 MB of that of IPU 0 are weights: without recomputation" in fp16
    assert "recompute " not in fp16


def test_the_tutorial_is_compared_with_its_own_batch_and_split(text):
    tutorial = text()
    assert "Graphcore's tutorial printed 307.7 samples/s" in tutorial
    assert "35.6 % below the 478 predicted here" in tutorial
    assert "limited by its host: eight workers decoded full-size PNGs" in tutorial
    assert "tutorial" not in text("batch.micro_batch_size=2")
    assert "tutorial" not in text("--hardware", "bow")


def test_refusals_of_poptorch_are_printed_beside_the_plan(plan, text):
    lines = plan("--hardware", "mk2", "batch.gradient_accumulation=2", config=DEMO)
    assert any(line.startswith("total") for line in lines)
    printed = " ".join(" ".join(lines).split())
    assert "refused batch.gradient_accumulation=2 is less than the 7 pipeline stages" in printed
    assert "8 pipeline cycles = 2 micro-batches + 7 pipeline stages - 1; used" in printed
    many = text("batch.replicas=32")
    assert "refused 4 stages x 32 replicas are 128 IPUs, and one process has at most 64" in many


def test_refusals_of_torchs_schedule_are_printed(text):
    few = text("batch.gradient_accumulation=2", config=GPU4)
    assert "refused batch.gradient_accumulation=2 is less than the 4 stages" in few


def test_the_host_limits_the_speed_without_a_cache(text):
    printed = text("data.cache=off", "data.num_workers=2")
    assert (
        "decodes about 142 images/s per process: 4 for this speed, and data.num_workers is 2"
    ) in printed
    assert "The host limits the speed" in printed


def test_the_speed_of_the_cache_depends_on_the_image_size(text):
    small, large = (text(f"data.image_size={size}", "model.name=vit-base") for size in (112, 448))
    assert "The cache serves about 100,000 images/s per process" in small
    assert "The cache serves about 6,250 images/s per process" in large


@pytest.mark.parametrize("arguments", [["--hardware", "mk2"], ["--hardware", "bow"]])
def test_sources_list_every_number_of_an_ipu(text, arguments):
    printed = text("--sources", *arguments)
    for words in ("clock_hz", "tile_bytes", "Pod16", "7,319", "308", "popliner", "imbalance"):
        assert words in printed


def test_sources_of_another_device_are_its_memory(text):
    assert "memory of the device is unknown" in text("--sources", config=GPU4)
    given = text("--sources", "planner.device_memory_gib=24", config=GPU4)
    assert "memory 25,769,803,776 bytes: planner.device_memory_gib" in given


def test_figures_are_png_and_svg(plan, tmp_path):
    folder = tmp_path / "new" / "folder"
    lines = plan("--figures", folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["memory.png", "memory.svg", "timeline.png", "timeline.svg"]
    for name in ("memory.png", "timeline.png"):
        with Image.open(folder / name) as image:
            assert image.width == 1200
    assert "<svg" in (folder / "timeline.svg").read_text()
    assert lines[-1].startswith("figures: ")


def test_the_place_of_the_optimizer_state_is_printed(plan):
    assert any(
        line.startswith("optimizer state, off chip ")
        for line in plan("engine.optimizer_state_on_chip=false")
    )
    shared = plan(config=ROOT / "configs" / "vit_pod16.yaml")
    assert any(line.startswith("optimizer state, on chip, 1/4 per replica ") for line in shared)


def test_sharded_stages_idle(text):
    printed = text("pipeline.execution=sharded")
    assert "128 micro-batches, one stage at a time: each idles 75.0 %" in printed
    assert "slowest" not in printed


def test_gpus_have_layout_bubble_and_bytes_but_no_time(plan, text):
    lines = plan(config=GPU4)
    assert lines[0] == "4 x GPU: 1 replica of 4 stages"
    assert cells(lines, "total") == ["1604.4", "1326.8", "1030.3", "721.9"]
    printed = " ".join(" ".join(lines).split())
    assert "GPU 0 is the slowest, 1.8 % over" in printed
    assert "update 1f1b with 8 micro-batches; bubble 26.6 %" in printed
    assert "speed not predicted" in printed
    assert "runs of engine pipeline on GPU in any precision" in printed
    assert "memory of the device is unknown: set planner.device_memory_gib" in printed
    assert not re.search(r"samples/s| ms\b|verdict|RTX", printed)
    interleaved = text("pipeline.schedule=interleaved_1f1b", config=GPU4)
    assert "(interleaved_1f1b is planned as 1f1b, with one stage per device)" in interleaved


def test_given_memory_has_a_verdict(plan):
    lines = plan("planner.device_memory_gib=1.5", config=GPU4)
    assert any("(a GPU has 1610.6, or 1,536 MiB)" in line for line in lines)
    assert cells(lines, "share") == ["99.6", "%", "82.4", "%", "64.0", "%", "44.8", "%"]
    assert "memory of the device: planner.device_memory_gib" in lines


def test_a_cpu_has_its_own_memory(plan):
    lines = plan(config=DEMO)
    assert lines[0] == "CPU, 1 process: 1 replica of 1 stage"
    assert cells(lines, "verdict (+- 10 %)") == ["fits"]
    assert "memory of the device: read from this machine" in lines


def test_search_prints_ten_and_why_the_first_is_the_fastest(plan):
    lines = plan("--search")
    ranks = [line.split()[0] for line in lines[1:] if line[:2].strip().isdigit()]
    assert ranks == [str(rank) for rank in (*range(1, 11), *range(1, 4))], "and of evaluation"
    text = " ".join(" ".join(lines).split())
    for words in (
        "9,152 cuts x batches x placements x recomputation tried",
        "refused accumulation 1, 2, 4: batch.gradient_accumulation=4 is less than the 7",
        "memory micro-batch 16 and larger: fit in no cut",
        "why 1 is the fastest, with",
        "1 is 2.08 times as fast",
        "fits closely",
        "1 [3,3,3,3] 16 32 512",
        "1 is the smallest host call that scores the 4,327 validation and 25,596 test images",
    ):
        assert words in text


def test_search_of_gpus_ranks_by_relative_speed(text):
    printed = text("--search", config=GPU4)
    assert "relative speed" in printed and "100.0 %" in printed
    assert "26.63 G operations per image on the slowest stage" in printed
    assert "nothing is left out for it" in printed
    assert "small micro-batches look too fast" in printed
    assert not re.search(r"samples/s| ms\b|on chip", printed)


def test_best_result_is_written_as_overrides(plan, tmp_path):
    out = tmp_path / "best.yaml"
    lines = plan("--search", "--write", out)
    assert lines[-1] == f"written: {out}"
    config = read_config([POD4, out])
    assert config.batch.micro_batch_size == 8
    batch = config.batch
    assert (batch.eval_micro_batch_size, batch.eval_device_iterations) == (16, 32)
    assert out.read_text().startswith(f"# python train.py --config {POD4} {out}\n")
    assert make_plan(config).samples_per_s > 900


def test_written_command_repeats_the_overrides(plan, tmp_path):
    out = tmp_path / "best.yaml"
    given = ["batch.replicas=4", "batch.micro_batch_size=2", "batch.global_batch_size=512"]
    lines = plan(*given, "--search", "--write", out, "--figures", tmp_path)
    first, _, third = out.read_text().splitlines()[:3]
    command = f"# python train.py --config {POD4} {out} batch.replicas=4"
    assert first == command, "overrides of searched keys would win over the file"
    trained = read_config([POD4, out], ["batch.replicas=4"])
    best = next(line for line in lines if line.startswith("1  "))
    assert f"{make_plan(trained).samples_per_s:,.0f}" in best
    assert "for 16 x Mk2 IPU" in third and "samples/s" in third and "% full" in third
    assert (tmp_path / "timeline.png").exists(), "of the best result"


def test_written_result_of_gpus_has_no_speed(plan, tmp_path):
    out = tmp_path / "best.yaml"
    plan("--search", "--write", out, config=GPU4)
    assert out.read_text().splitlines()[2] == (
        "# Found by python -m cxr_vit plan --search for 4 x GPU."
    )


def test_search_around_a_configuration_that_does_not_fit(text):
    large = text("batch.micro_batch_size=34", "--search")
    assert "The configuration's own, [3,3,3,3], 34 x 128, does not fit" in large
    demo = ["--hardware", "mk2", "batch.eval_device_iterations=4", "--search"]
    refused = text(*demo, config=DEMO)
    assert "The configuration's own, [1,1,1,1], 16 x 4, is refused" in refused


def test_search_with_all_refused_does_not_blame_the_memory(text):
    printed = text("--search", "--accumulations", "1,2")
    assert "nothing is left: give other --accumulations" in printed
    assert "weights=fp16" not in printed


def test_search_that_finds_nothing_writes_nothing(plan, tmp_path):
    out = tmp_path / "best.yaml"
    with pytest.raises(ConfigError, match=r"best.yaml was not written: the search found nothing"):
        plan("--search", "--micro-batches", "64,128", "--accumulations", "8", "--write", out)
    assert not out.exists()


def test_grid_of_the_search_can_be_given(plan):
    lines = plan("--search", "--micro-batches", "1,4", "--accumulations", "8,16,64")
    tried = f"{286 * 6 * 2 * 2:,} cuts x batches x placements x recomputation tried"
    assert lines[0] == f"4 x Mk2 IPU (GC200): {tried}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--write", "x.yaml"], "--write needs --search"),
        (["--micro-batches", "1"], "--micro-batches needs --search"),
        (["--search", "--images", "9"], "--images does not go with --search"),
        (["--sources", "--search"], "--sources only lists numbers"),
        (["--search", "--write", str(POD4)], "exists"),
        (["model.name=owner/model"], "does not imply its size"),
        (["--calibrate", "nowhere"], "there is no such folder"),
        (["batch.micro_batch_sizes=1"], "Did you mean 'batch.micro_batch_size'"),
        (["pipeline.layers_per_stage=[3,3,3,2]"], "places 11 layers"),
        (["planner.hardware=gpu"], "must be one of auto, mk2, bow"),
    ],
)
def test_mistakes_are_refused(plan, arguments, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        plan(*arguments)


@pytest.mark.parametrize("arguments", [["--images", "0"], ["--micro-batches", "1,a"]])
def test_invalid_numbers_are_refused(plan, arguments):
    with pytest.raises(ConfigError, match=f"argument {arguments[0]}: .* is no integer of 1"):
        plan(*arguments)


def test_calibrated_plan_repeats_the_speed_of_the_run(plan, run):
    lines = plan("--calibrate", run, config=None)
    assert lines[0].startswith("calibration, samples/s")
    printed = " ".join(" ".join(lines).split())
    assert "engine torch on CPU in fp32; predictions are stated with an error of" in printed
    assert "1 constant fitted to 1 run (run)" in printed
    assert "small micro-batches look too fast" in printed
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [event["perf/samples_per_s"] for event in events if "perf/samples_per_s" in event]
    speed = re.search(r"speed ([\d,]+) samples/s \(([\d,]+) to ([\d,]+)\)", printed)
    predicted, low, high = (float(word.replace(",", "")) for word in speed.groups())
    assert 0.5 * min(speeds) < predicted < 2 * max(speeds)
    assert low < predicted < high


def test_overrides_win_over_the_configuration_of_the_run(plan, run):
    lines = plan("--calibrate", run, "batch.gradient_accumulation=4", config=None)
    assert any(line.endswith("4 micro-batches") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "config", "words"),
    [
        (["--hardware", "mk2"], None, "engine poptorch on Mk2 IPU .*: they differ in engine"),
        ([], POD4, "planned for engine poptorch on Mk2 IPU"),
        ([], GPU4, "planned for engine pipeline on GPU"),
        (["engine.name=pipeline"], None, "they differ in engine"),
        (["engine.precision=bf16"], None, "they differ in precision"),
    ],
)
def test_runs_do_not_calibrate_another_engine_device_or_precision(
    plan, run, arguments, config, words
):
    with pytest.raises(ConfigError, match=f"run is a run of engine torch on CPU in fp32.*{words}"):
        plan("--calibrate", run, *arguments, config=config)


def test_command_imports_no_torch():
    code = (
        "import sys; from cxr_vit.cli import main; from cxr_vit.planner import hardware;"
        "hardware._DRIVERS = ();"
        f"main(['plan', '--config', {str(POD4)!r}]);"
        f"main(['plan', '--config', {str(DEMO)!r}]);"
        f"main(['plan', '--search', '--config', {str(POD4)!r}]);"
        "print(sorted({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], cwd=str(ROOT), encoding="utf-8")
    assert out.splitlines()[-1] == "[]"
