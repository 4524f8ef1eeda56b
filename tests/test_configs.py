"""The files in configs/: each loads, passes the checks and states its command and result."""

from pathlib import Path

import pytest

from cxr_vit.config import BatchPlan, Config, check, read_config
from cxr_vit.config.architectures import SIZES
from cxr_vit.config.rules import check_processes

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
NAMES = [path.name for path in CONFIGS]


@pytest.fixture(scope="module")
def pod4() -> Config:
    return read_config([FOLDER / "vit_pod4.yaml"])


@pytest.fixture(scope="module")
def demo() -> Config:
    return read_config([FOLDER / "vit_demo.yaml"])


def test_main_configs_exist():
    assert {"vit_demo.yaml", "vit_pod4.yaml"} <= set(NAMES)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_config_passes_the_checks(path):
    config = read_config([path])
    assert check(config) is config
    assert config.run.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_first_line_is_the_command(path):
    first_line = path.read_text(encoding="utf-8").split("\n")[0]
    launcher = "python"
    config = read_config([path])
    if config.engine.name == "pipeline":
        processes = len(config.pipeline.layers_per_stage) * config.batch.replicas
        launcher = f"torchrun --nproc-per-node {processes}"
    assert first_line == f"# {launcher} train.py --config configs/{path.name}"


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_pipeline_config_passes_the_process_checks(path):
    config = read_config([path])
    if config.engine.name != "pipeline":
        pytest.skip("for another engine")
    check_processes(config, "pipeline", len(config.pipeline.layers_per_stage))


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_header_states_the_known_result(path):
    header = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.startswith("#"):
            break
        header.append(line)
    assert any(line.startswith("# Result: ") for line in header[1:])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 1337),
        ("data.split", "random"),
        ("data.include_no_finding", True),
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
def test_the_tutorials_recipe_matches_graphcores(key, value):
    section, _, name = key.partition(".")
    tutorial = read_config([FOLDER / "recipes" / "tutorial.yaml"])
    assert tutorial.model_dump()[section][name] == value


def test_pod4_has_a_global_batch_of_128(pod4):
    assert BatchPlan.from_section(pod4.batch).global_batch_size == 128


@pytest.mark.parametrize("name", ["vit_gpu", "vit_gpu4", "vit_pod16", "vit_pod4_fp16"])
def test_other_machines_train_by_the_recipe_of_pod4(pod4, name):
    config = read_config([FOLDER / f"{name}.yaml"])
    assert BatchPlan.from_section(config.batch).global_batch_size == 128
    for key in ("augment", "model", "schedule", "train"):
        assert config.model_dump()[key] == pod4.model_dump()[key]
    for key in ("root", "split", "val_fraction", "image_size", "split_seed"):
        assert getattr(config.data, key) == getattr(pod4.data, key)
    for key in ("name", "base_lr", "layer_decay", "weight_decay"):
        assert getattr(config.optim, key) == getattr(pod4.optim, key)


def test_pod4_reads_from_dataset_dir(monkeypatch):
    monkeypatch.setenv("DATASET_DIR", "/disk")
    assert read_config([FOLDER / "vit_pod4.yaml"]).data.root == "/disk/chest-xray-nihcc"


def test_demo_needs_no_download(demo):
    assert demo.model.name in SIZES
    assert demo.data.sample_images is not None


def test_demo_has_four_stages(demo):
    assert len(demo.pipeline.layers_per_stage) == 4
