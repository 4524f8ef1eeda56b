"""configs/recipes: what the files say, and five steps of each on the CPU."""

import math
import re

import pytest

from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.cli import main
from cxr_vit.config import load_config, read_config
from cxr_vit.planner.estimate import make_plan, plan_evaluation
from pages import DOCS
from recipes import FOLDER, POD4, RECIPES, RUN, TRAINED, files, small

NAMES = [path.stem for path in RECIPES]
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)


def header(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def headers_with(weights):
    """Return the lines of the headers of the recipes with these weights."""
    found = [path for path in RECIPES if read_config([path]).model.name == weights]
    return "\n".join(line for path in found for line in header(path))


def differences(one, other):
    """Return the keys with different values."""
    first, second = (read_config([FOLDER / f"{name}.yaml"]).flat() for name in (one, other))
    return {key for key in first if first[key] != second[key]}


def test_recipes_exist():
    assert NAMES == [
        "benchmark_transformers_vit_b16",
        "eva_x_style",
        "medical_mae_vit_b",
        "medical_mae_vit_s",
        "rad_dino_probe",
        "tutorial",
    ]


@every_recipe
def test_header_has_command_source_and_results(recipe):
    command, *lines = header(recipe)
    program = "-m cxr_vit probe" if "probe" in recipe.stem else "train.py"
    assert command == f"# python {program} --config configs/recipes/{recipe.name}"
    text = "\n".join(lines)
    assert "# Published" in text
    assert "# Result: not reproduced here" in text
    if recipe.stem != "rad_dino_probe":  # there is no public code
        assert re.search(r"Code: [\w-]+/[\w-]+, commit [0-9a-f]{7}\b", text)


@every_recipe
def test_passes_the_checks_under_its_name(recipe):
    assert load_config([recipe]).run.name == recipe.stem


@pytest.mark.parametrize(
    ("name", "rate", "images"),
    [
        ("benchmark_transformers_vit_b16", 1e-6 + 0.16 * (0.1 - 1e-6) / 20, 64),
        ("eva_x_style", 1e-3, 1024),
        ("medical_mae_vit_b", 2.5e-4 * 1024 / 256, 1024),
        ("medical_mae_vit_s", 2.5e-4 * 1024 / 256, 1024),
        ("tutorial", 2e-4, 128),
    ],
)
def test_rate_and_global_batch_are_those_of_the_authors(name, rate, images):
    config = read_config([FOLDER / f"{name}.yaml"])
    assert config.peak_lr == pytest.approx(rate, rel=2e-3)
    assert config.batch.images_per_update == images


def test_recipes_of_one_source_differ_where_their_headers_say():
    assert differences("medical_mae_vit_s", "medical_mae_vit_b") == {"run.name", "model.name"}
    assert differences("medical_mae_vit_s", "eva_x_style") == {
        *("run.name", "train.epochs"),
        *("optim.lr", "optim.base_lr", "schedule.name", "schedule.min_lr"),
    }


@pytest.mark.parametrize("recipe", TRAINED, ids=lambda path: path.stem)
def test_is_accepted_for_four_ipus_and_fits(recipe):
    config = load_config(files(recipe), ["engine.name=poptorch"])
    assert len(config.pipeline.layers_per_stage) == 4
    assert config.batch.images_per_update == read_config([recipe]).batch.images_per_update
    plan = make_plan(config)
    assert plan.fits
    assert plan.fullest.memory.verdict == "fits"


def test_probe_is_accepted_for_four_ipus():
    load_config(
        [FOLDER / "rad_dino_probe.yaml"],
        ["engine.name=poptorch", "batch.eval_micro_batch_size=2"],
    )


@pytest.mark.parametrize("recipe", [*RECIPES[:4]], ids=NAMES[:4])
def test_fits_a_gpu_of_24_gb(recipe):
    memory = "planner.device_memory_gib=22"  # 24 GB, without the system's share
    plan = make_plan(load_config([recipe], ["engine.device=cuda", memory]))
    assert plan.fits


def test_costs_of_the_page_are_those_of_the_planner():
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    on_ipus = make_plan(load_config(files(FOLDER / "medical_mae_vit_b.yaml")))
    speed, low, high = on_ipus.samples_per_s, *on_ipus.speed_range
    images = 75 * on_ipus.images
    hours, longest, shortest = (images / one / 3600 for one in (speed, low, high))
    assert f"75 epochs in {hours:.1f} hours ({shortest:.1f} to {longest:.1f})" in page
    assert f"{speed:.0f} images/s ({low:.0f} to {high:.0f})" in page
    small, large = (
        make_plan(load_config([FOLDER / f"medical_mae_vit_{size}.yaml"], ["engine.device=cuda"]))
        for size in "sb"
    )
    memory = [f"{plan.fullest.memory.total / 1e9:.1f}" for plan in (small, large)]
    assert f"{' or '.join(memory)} GB of the GPU's memory" in page


def test_larger_images_of_the_page_are_accepted_and_fit():
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("| larger images |")]
    on_gpus, on_ipus = (words.split() for words in re.findall(r"`([^`]*=[^`]*)`", row))
    recipe = FOLDER / "medical_mae_vit_b.yaml"
    assert make_plan(
        load_config([recipe], [*on_gpus, "engine.device=cuda", "planner.device_memory_gib=22"])
    ).fits
    config = load_config(files(recipe), [*on_gpus, *on_ipus])
    assert make_plan(config).fits
    assert plan_evaluation(config).plan.fits


@every_recipe
def test_page_says_where_the_weights_are(recipe):
    page = (DOCS / "weights.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if re.match(rf"\|.*`{recipe.stem}`.*\|", line)]
    name = read_config([recipe]).model.name
    if name.startswith("weights/"):  # converted from the file that the header names
        (name,) = set(re.findall(r"convert-weights (\S+)", headers_with(name)))
    assert f"`{name}`" in row


def test_pod4_says_how_it_is_used():
    command = header(POD4)[0]
    assert re.fullmatch(
        r"# python train\.py --config configs/recipes/\w+\.yaml configs/recipes/pod4\.yaml", command
    )


@pytest.mark.parametrize("recipe", RUN, ids=lambda path: path.stem)
def test_five_steps_on_the_cpu(recipe, sample_root, tmp_path):
    overrides = [*small(recipe, sample_root), "engine.name=torch", f"run.dir={tmp_path / 'run'}"]
    config = load_config([recipe], overrides)
    data, trainer = ChestXrayDataModule(config), Trainer(config)
    module = ViTModule(config, data)
    trainer.fit(module, data)
    assert trainer.global_step == 5
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    if config.data.test_fraction or config.data.split == "official":
        assert 0 < trainer.test(module, data)["test/auroc_macro"] < 1


def test_probe_on_the_cpu(sample_root, tmp_path):
    recipe = FOLDER / "rad_dino_probe.yaml"
    words = ["engine.name=torch", f"run.dir={tmp_path / 'run'}", "probe.steps=20"]
    assert main(["probe", "--config", str(recipe), *small(recipe, sample_root), *words]) == 0
