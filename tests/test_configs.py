"""Every YAML in configs/ loads, passes the checks and says how it is run."""

from pathlib import Path

import pytest

from cxr_vit.config import BatchPlan, Config, check, load_config
from cxr_vit.config.architectures import SIZES
from cxr_vit.config.rules import check_processes

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
NAMES = [path.name for path in CONFIGS]


@pytest.fixture(scope="module")
def pod4() -> Config:
    return load_config([Path(__file__).parents[1] / "configs" / "vit_pod4.yaml"])


def test_the_configs_of_the_first_release_are_there():
    assert {"vit_demo.yaml", "vit_pod4.yaml"} <= set(NAMES)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_config_passes_the_checks(path):
    config = load_config([path])
    assert check(config) is config


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_first_line_is_the_command_that_runs_it(path):
    first_line = path.read_text(encoding="utf-8").split("\n")[0]
    launcher = "python"
    config = load_config([path])
    if config.engine.name == "pipeline":
        processes = len(config.pipeline.layers_per_stage) * config.batch.replicas
        launcher = f"torchrun --nproc-per-node {processes}"
    assert first_line == f"# {launcher} train.py --config configs/{path.name}"


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_pipeline_of_processes_passes_its_checks(path):
    config = load_config([path])
    if config.engine.name != "pipeline":
        pytest.skip("another engine's")
    check_processes(config, "pipeline", len(config.pipeline.layers_per_stage))


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_header_says_what_result_it_is_known_to_give(path):
    header = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.startswith("#"):
            break
        header.append(line)
    assert len(header) > 1, "the command, then the result it is known to give (issue 2)"


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_run_has_the_name_of_its_file(path):
    assert load_config([path]).run.name == path.stem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 1337),
        ("data.split", "official"),
        ("data.image_size", 224),
        ("model.name", "google/vit-base-patch16-224-in21k"),
        ("pipeline.layers_per_stage", [3, 3, 3, 3]),
        ("batch.micro_batch_size", 1),
        ("batch.gradient_accumulation", 128),
        ("batch.replicas", 1),
        ("batch.device_iterations", 1),
        ("optim.name", "adamw"),
        ("optim.lr", 2e-4),
        ("optim.weight_decay", 0.0),
        ("optim.max_grad_norm", None),
        ("schedule.name", "cosine"),
        ("schedule.warmup_ratio", 0.25),
        ("train.epochs", 3),
        ("train.log_every_steps", 50),
        ("train.checkpoint_every_steps", 1000),
    ],
)
def test_pod4_is_the_tutorials_recipe(pod4, key, value):
    section, _, name = key.partition(".")
    assert pod4.model_dump()[section][name] == value


def test_pod4_updates_on_128_images(pod4):
    assert BatchPlan.from_section(pod4.batch).global_batch_size == 128


def test_pod4_reads_where_dataset_dir_says(monkeypatch):
    monkeypatch.setenv("DATASET_DIR", "/disk")
    path = Path(__file__).parents[1] / "configs" / "vit_pod4.yaml"
    assert load_config([path]).data.root == "/disk/chest-xray-nihcc"


def test_demo_needs_no_download():
    config = load_config([Path(__file__).parents[1] / "configs" / "vit_demo.yaml"])
    assert config.model.name in SIZES
    assert config.data.sample_images is not None


def test_demo_is_cut_into_four_stages():
    config = load_config([Path(__file__).parents[1] / "configs" / "vit_demo.yaml"])
    assert len(config.pipeline.layers_per_stage) == 4
