"""What the commands answer to a newcomer's mistakes, and to a machine that is too small."""

import sys
from typing import NamedTuple

import pytest
import torch

from conftest import SMALL
from cxr_vit import cli
from cxr_vit.commands import evaluate, train
from cxr_vit.engines import compiled
from cxr_vit.engines.torch_engine import TorchEngine
from cxr_vit.model.module import ViTModule
from cxr_vit.model.vit import VitParts

can_compile = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < compiled._OLDEST,
    reason="this torch refuses engine.compile",
)


class Result(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process."""

    def call_command(command, *words):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.run(command.main)
        return Result(ended.value.code, *capsys.readouterr())

    return call_command


@pytest.fixture(scope="module")
def finished(sample_root, tmp_path_factory):
    """A run of three steps."""
    run = tmp_path_factory.mktemp("runs") / "run"
    words = [*SMALL, "train.steps=3", f"data.root={sample_root}", f"run.dir={run}"]
    assert train.main(words) == 0
    return run


def contents(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_finished_run_has_nothing_to_do(call, finished):
    before = contents(finished)
    result = call(train, "--resume", finished)
    assert (result.status, result.err) == (0, "")
    (line,) = result.out.splitlines()
    assert line.startswith(
        f"{finished / 'checkpoints' / 'step_00000003'} is at step 3, the last one"
    )
    assert "nothing to do" in line
    assert contents(finished) == before


@pytest.mark.parametrize("how", ["off", pytest.param("layers", marks=can_compile)])
def test_an_own_layer_with_drop_path_is_one_message(call, sample_root, tmp_path, monkeypatch, how):
    build = ViTModule.configure_model

    def with_own_layer(module):
        model = build(module)
        layer = VitParts(model).layers[0][1]
        layer.__class__ = type("Own", (type(layer),), {"__module__": "mine"})
        return model

    monkeypatch.setattr(ViTModule, "configure_model", with_own_layer)
    words = [*SMALL, f"data.root={sample_root}", f"run.dir={tmp_path / 'run'}"]
    result = call(train, *words, "model.drop_path=0.5", f"engine.compile={how}")
    assert result.status == 2 and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("ModelError: Own, in an encoder layer, has a forward pass of its own")
    assert last.endswith("Set model.drop_path=0, and pipeline.recompute=every_layer or none.")


def exhaust(*_, **__):
    """Ask torch for more memory than any machine has."""
    torch.empty(2**56)


@pytest.mark.parametrize("method", ["compile", "train_step"])
def test_lack_of_memory_is_one_line_with_a_smaller_batch(
    call, sample_root, tmp_path, monkeypatch, method
):
    monkeypatch.setattr(TorchEngine, method, exhaust)
    result = call(train, *SMALL, f"data.root={sample_root}", f"run.dir={tmp_path / 'run'}")
    assert result.status == 2
    assert result.err.splitlines()[-1] == (
        "OutOfMemory: out of memory with batch.micro_batch_size=4 on cpu. Keep the global batch of"
        " 8 with batch.micro_batch_size=2 batch.gradient_accumulation=4. Or hold less:"
        " pipeline.recompute=every_layer."
    )
    assert "Traceback" not in result.err


def test_lack_of_memory_in_evaluation_is_one_line(call, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(TorchEngine, "predict", exhaust)
    result = call(evaluate, "--checkpoint", finished, "--out", tmp_path / "report")
    assert result.status == 2
    assert result.err.startswith("OutOfMemory: out of memory in evaluation with ")
    assert "Use batch.eval_micro_batch_size=4" in result.err


def test_run_is_evaluated_by_its_best_checkpoint(call, finished, tmp_path):
    out = tmp_path / "report"
    assert call(evaluate, "--checkpoint", finished, "--out", out).status == 0
    assert f'"checkpoint": "{finished / "checkpoints" / "best"}"' in (
        out / "metrics.json"
    ).read_text(encoding="utf-8")


def test_file_of_a_checkpoint_is_answered_with_its_folder(call, finished):
    folder = finished / "checkpoints" / "last"
    result = call(evaluate, "--checkpoint", folder / "model.safetensors")
    assert result.status == 2
    assert result.err == (
        f"CheckpointError: {folder / 'model.safetensors'} is not a checkpoint: it is a file, and a"
        f" checkpoint is a folder. Use {folder}.\n"
    )


def test_misspelt_model_costs_no_cache(call, sample_root, tmp_path):
    words = [word for word in SMALL if not word.startswith("model.name")]
    cache = tmp_path / "cache"
    result = call(
        train, *words, "model.name=google/vit-bse-patch8", f"data.root={sample_root}",
        f"data.cache_dir={cache}", f"run.root={tmp_path / 'runs'}",
    )  # fmt: skip
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert line.startswith("ModelError: cannot load model.name='google/vit-bse-patch8': ")
    assert "vit-micro" in line
    assert list(tmp_path.iterdir()) == []
    assert result.out == ""


def test_data_problem_announces_no_run(call, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    result = call(train, *SMALL, f"data.root={root}", f"run.root={tmp_path / 'runs'}")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("DataError: ")
    assert not (tmp_path / "runs").exists()
