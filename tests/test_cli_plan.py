"""python -m cxr_vit plan, as a person calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cxr_vit.cli import main
from cxr_vit.config import load_config
from cxr_vit.errors import ConfigError
from cxr_vit.planner.estimate import make_plan

ROOT = Path(__file__).resolve().parents[1]
POD4 = ROOT / "configs" / "vit_pod4.yaml"


@pytest.fixture
def plan(capsys):
    """Call the command; return its lines."""

    def call(*arguments, config=POD4):
        files = ["--config", str(config)] if config else []
        assert main(["plan", *files, *map(str, arguments)]) == 0
        return capsys.readouterr().out.splitlines()

    return call


def cells(lines, label):
    """The cells of a row, without its label."""
    row = next(line for line in lines if line.startswith(label))
    return row[len(label) :].split()


def test_it_prints_everything_that_the_plan_knows(plan):
    lines = plan()
    predicted = make_plan(load_config([POD4]))
    assert "  IPU 0  embedding, layers 0 to 2" in lines
    assert "  IPU 3  layers 9 to 11, head" in lines
    assert cells(lines, "parameters, millions") == ["22.01", "21.26", "21.26", "21.28"]
    rows = {
        "weights": "weights",
        "gradient accumulators": "accumulators",
        "optimizer state, on chip": "optimizer",
        "activation stash": "stash",
        "live in backward": "live",
        "transient of products": "transient",
        "input and output": "io",
        "code": "code",
        "unevenness of tiles": "uneven",
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
        "478 samples/s (325 to 901), predicted",
        "an epoch of 82,197 images (NIH's official list) takes 2.9 min",
        "must read 478 images/s and send 24.0 MB/s",
        "fitted to 2 published runs; nothing here was measured on your machine",
    ):
        assert words in text


def test_it_says_plainly_where_the_tutorial_stands(plan):
    text = " ".join(" ".join(plan()).split())
    assert "Graphcore's tutorial printed 307.7 samples/s" in text
    assert "35.6 % below the 478 predicted here" in text
    assert "bound by its host, most likely: eight workers decoded full-size PNGs" in text
    assert "tutorial" not in " ".join(plan("batch.micro_batch_size=2"))
    assert "tutorial" not in " ".join(plan("--hardware", "bow"))


def test_what_poptorch_refuses_is_told_beside_the_plan(plan):
    lines = plan("--hardware", "mk2", config=ROOT / "configs" / "vit_demo.yaml")
    text = " ".join(" ".join(lines).split())
    assert "refused batch.gradient_accumulation=2 is less than the 7 pipeline stages" in text
    assert any(line.startswith("total") for line in lines)


def test_without_a_cache_the_host_is_the_bound(plan):
    text = " ".join(" ".join(plan("data.cache=off", "data.num_workers=2")).split())
    assert (
        "decodes some 142 images/s a process: 4 for this speed, and data.num_workers is 2" in text
    )
    assert "Bound by the host" in text


@pytest.mark.parametrize("hardware", ["mk2", "bow", "gpu"])
def test_every_number_of_a_device_is_listed_with_its_source(plan, hardware):
    lines = plan("--sources", "--hardware", hardware)
    text = " ".join(" ".join(lines).split())
    for words in ("clock_hz", "Pod16", "7,319", "308", "timm"):
        assert words in text


def test_figures_are_drawn_as_png_and_svg(plan, tmp_path):
    lines = plan("--figures", tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["memory.png", "memory.svg", "timeline.png", "timeline.svg"]
    for name in ("memory.png", "timeline.png"):
        with Image.open(folder / name) as image:
            assert image.width == 1200
    assert "<svg" in (folder / "timeline.svg").read_text()
    assert lines[-1].startswith("figures: ")


def test_where_the_optimizers_state_lies_is_said(plan):
    assert any(
        line.startswith("optimizer state, off chip ")
        for line in plan("engine.optimizer_state_on_chip=false")
    )
    shared = plan(config=ROOT / "configs" / "vit_pod16.yaml")
    assert any(line.startswith("optimizer state, on chip, 1/4 a replica ") for line in shared)


def test_more_than_a_process_has_is_told(plan):
    text = " ".join(" ".join(plan("batch.replicas=32")).split())
    assert "refused 4 stages x 32 replicas are 128 IPUs, and one process has at most 64" in text


def test_what_torchs_schedule_refuses_is_told(plan):
    config = ROOT / "configs" / "vit_gpu4.yaml"
    text = " ".join(" ".join(plan("batch.gradient_accumulation=2", config=config)).split())
    assert "refused batch.gradient_accumulation=2 is less than the 4 stages" in text


def test_stages_one_at_a_time_are_said_to_idle(plan):
    text = " ".join(" ".join(plan("pipeline.execution=sharded")).split())
    assert "128 micro-batches, one stage at a time: each idles 75.0 %" in text
    assert "slowest" not in text


def test_few_micro_batches_have_no_steady_phase(plan):
    demo = ROOT / "configs" / "vit_demo.yaml"
    text = " ".join(" ".join(plan("--hardware", "mk2", config=demo)).split())
    assert "8 pipeline cycles = 2 micro-batches + 7 pipeline stages - 1; used" in text


def test_a_search_prints_ten_and_why_the_first_wins(plan):
    lines = plan("--search")
    ranks = [line.split()[0] for line in lines if line[:2].strip().isdigit() and "chip" in line]
    assert ranks == [str(rank) for rank in range(1, 11)]
    text = " ".join(" ".join(lines).split())
    for words in (
        "4,576 cuts x batches x placements tried",
        "refused accumulation 1, 2, 4: batch.gradient_accumulation=4 is less than the 7",
        "memory micro-batch 16 and larger: fit in no cut",
        "why 1 wins with",
        "1 is 2.08 times as fast",
        "fits closely",
    ):
        assert words in text


def test_the_best_is_written_as_an_overlay_that_trains(plan, tmp_path):
    out = tmp_path / "best.yaml"
    lines = plan("--search", "--write", out)
    assert lines[-1] == f"written: {out}"
    config = load_config([POD4, out])
    assert config.batch.micro_batch_size == 8
    assert out.read_text().startswith(f"# python train.py --config {POD4} {out}\n")
    assert make_plan(config).samples_per_s > 900


def test_the_command_written_repeats_the_overrides(plan, tmp_path):
    out = tmp_path / "best.yaml"
    given = ["batch.replicas=4", "batch.micro_batch_size=2", "batch.global_batch_size=512"]
    lines = plan(*given, "--search", "--write", out, "--figures", tmp_path)
    first, _, third = out.read_text().splitlines()[:3]
    assert first == f"# python train.py --config {POD4} {out} batch.replicas=4", "no more wins"
    trained = load_config([POD4, out], ["batch.replicas=4"])
    best = next(line for line in lines if line.startswith("1  "))
    assert f"{make_plan(trained).samples_per_s:,.0f}" in best
    assert "on 16 x Mk2 IPU" in third
    assert (tmp_path / "timeline.png").exists(), "of the first that was found"


def test_a_configuration_that_does_not_fit_is_no_measure(plan):
    text = " ".join(" ".join(plan("batch.micro_batch_size=34", "--search")).split())
    assert "The configuration's own, [3,3,3,3], 34 x 128, does not fit" in text
    demo = ["--hardware", "mk2", "batch.eval_device_iterations=4", "--search"]
    text = " ".join(" ".join(plan(*demo, config=ROOT / "configs" / "vit_demo.yaml")).split())
    assert "The configuration's own, [1,1,1,1], 16 x 2, is refused" in text


def test_where_a_start_is_not_known_small_micro_batches_are_not_trusted(plan):
    for arguments in ([], ["--search"]):
        text = " ".join(" ".join(plan(*arguments, config=ROOT / "configs/vit_gpu4.yaml")).split())
        assert "small micro-batches look too fast" in text
        assert "on chip" not in text


def test_the_caches_speed_is_of_its_images_size(plan):
    small, large = (
        " ".join(" ".join(plan(f"data.image_size={size}", "model.name=vit-base")).split())
        for size in (112, 448)
    )
    assert "The cache serves some 100,000 images/s a process" in small
    assert "The cache serves some 6,250 images/s a process" in large


def test_all_refused_is_not_too_little_memory(plan):
    text = " ".join(plan("--search", "--accumulations", "1,2"))
    assert "nothing is left: give other --accumulations" in text
    assert "weights=fp16" not in text


def test_a_search_that_finds_nothing_writes_nothing(plan, tmp_path):
    out = tmp_path / "best.yaml"
    with pytest.raises(ConfigError, match=r"best.yaml was not written: the search found nothing"):
        plan("--search", "--micro-batches", "64,128", "--accumulations", "8", "--write", out)
    assert not out.exists()


def test_the_grid_to_search_can_be_given(plan):
    lines = plan("--search", "--micro-batches", "1,4", "--accumulations", "8,16,64")
    tried = f"{286 * 6 * 2:,} cuts x batches x placements tried"
    assert lines[0] == f"4 x Mk2 IPU (GC200): {tried}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--write", "x.yaml"], "--write needs --search"),
        (["--micro-batches", "1"], "--micro-batches needs --search"),
        (["--search", "--images", "9"], "--images does not go with --search"),
        (["--sources", "--search"], "--sources only lists numbers"),
        (["--search", "--write", str(POD4)], "exists"),
        (["model.name=owner/model"], "does not tell its size"),
        (["--calibrate", "nowhere"], "there is no such folder"),
        (["batch.micro_batch_sizes=1"], "Did you mean 'batch.micro_batch_size'"),
        (["pipeline.layers_per_stage=[3,3,3,2]"], "places 11 layers"),
        (["planner.hardware=ipu"], "must be one of auto, mk2, bow, gpu"),
    ],
)
def test_mistakes_are_told(plan, arguments, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        plan(*arguments)


@pytest.mark.parametrize("arguments", [["--images", "0"], ["--micro-batches", "1,a"]])
def test_numbers_that_are_none_are_refused(plan, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        plan(*arguments)
    assert ended.value.code == 2
    assert "argument" in capsys.readouterr().err


def test_a_calibrated_plan_is_of_the_run(plan, tmp_path, small_overrides):
    import train

    folder = tmp_path / "run"
    more = ["train.steps=4", "train.log_every_steps=1", "engine.name=torch"]
    assert train.main([*small_overrides, *more, f"run.dir={folder}"]) == 0
    plan("--sources")  # what training printed is read away
    lines = plan("--calibrate", folder, config=None)
    assert lines[0].startswith("calibration, samples/s")
    assert "The times are a CPU's" in " ".join(lines)
    assert any("fitted to run" in line for line in lines)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [event["perf/samples_per_s"] for event in events if "perf/samples_per_s" in event]
    (speed,) = [line for line in lines if line.startswith("speed")]
    predicted = float(speed.split()[1].replace(",", ""))
    assert 0.5 * min(speeds) < predicted < 2 * max(speeds)


def test_overrides_win_over_what_the_run_was(plan, tmp_path, small_overrides):
    import train

    folder = tmp_path / "run"
    more = ["train.steps=4", "train.log_every_steps=1", "engine.name=torch"]
    assert train.main([*small_overrides, *more, f"run.dir={folder}"]) == 0
    staged = ["engine.name=pipeline", "batch.gradient_accumulation=4"]
    lines = plan("--calibrate", folder, *staged, config=None)
    assert any("1f1b with 4 micro-batches" in line for line in lines)
    out = tmp_path / "best.yaml"
    plan("--calibrate", folder, staged[0], "--search", "--write", out, config=None)
    command = f"# python train.py --config {folder / 'config.yaml'} {out} engine.name=pipeline"
    assert out.read_text().splitlines()[0] == command


def test_a_run_tells_nothing_of_another_kind_of_device(plan, tmp_path, small_overrides):
    import train

    folder = tmp_path / "run"
    assert train.main([*small_overrides, "engine.name=torch", f"run.dir={folder}"]) == 0
    with pytest.raises(ConfigError, match="it ran on CPU, and that tells nothing of Mk2 IPU"):
        plan("--calibrate", folder, "--hardware", "mk2", config=None)


def test_runs_of_another_device_do_not_calibrate_a_plan(plan, tmp_path, small_overrides):
    import train

    folder = tmp_path / "run"
    assert train.main([*small_overrides, "engine.name=torch", f"run.dir={folder}"]) == 0
    with pytest.raises(ConfigError, match="planned for Mk2 IPU"):
        plan("--calibrate", folder)


def test_the_command_line_imports_no_torch():
    code = (
        "import sys; from cxr_vit.cli import main;"
        f"main(['plan', '--config', {str(POD4)!r}]);"
        f"main(['plan', '--search', '--config', {str(POD4)!r}]);"
        "print(sorted({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], cwd=str(ROOT), encoding="utf-8")
    assert out.splitlines()[-1] == "[]"
