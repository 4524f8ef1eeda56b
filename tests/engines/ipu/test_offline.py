"""--compile-only, and the cache of compiled graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr_vit.errors import ConfigError, DeviceError, EngineUnavailable
from fakes import loading

from .commands import SMALL, compiled, messages


@pytest.fixture
def compile_only(commands, monkeypatch):
    """Run --compile-only without data and without a runs folder."""
    import train

    def run(*overrides):
        settings = [
            *(f"{item}" for item in SMALL if not item.startswith("engine.executable_cache")),
            "data.root=nowhere/at/all",
            f"run.root={commands.folder / 'runs'}",
            f"engine.executable_cache={commands.folder / 'cache'}",
        ]
        return train.main(["--config", str(commands.file), "--compile-only", *settings, *overrides])

    return run


def cached(commands):
    return sorted(commands.folder.glob("cache/*/*.popef"))


@pytest.fixture
def a_cache_is_written(ipu, monkeypatch):
    """Write cache files as PopART does; the harness of the front end writes none."""
    poptorch, inspection = ipu
    compile_graph = poptorch.PoplarExecutor.compile

    def compile_and_write(executor, *inputs):
        compile_graph(executor, *inputs)
        folder = Path(inspection.executable(executor).options["cachePath"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{len(list(folder.glob('*.popef')))}.popef").touch()

    monkeypatch.setattr(poptorch.PoplarExecutor, "compile", compile_and_write)


def test_both_graphs_are_compiled_without_an_ipu(
    ipu, a_cache_is_written, compile_only, commands, capsys
):
    _, inspection = ipu
    inspection.config().hardware_version = 0
    inspection.config().available_ipus = 0
    assert compile_only("engine.ipu_version=c600") == 0
    assert "compiled for c600 in" in capsys.readouterr().out
    inference, training = compiled(inspection)
    for executable in (inference, training):
        assert executable.options["connection_type"] == 2, "Never"
        assert executable.options["ipu_version"] == 21
        assert executable.blocks
    names = set(inspection.log().names())
    assert not names & {"attachToDevice", "loadEngineAndConnectStreams", "execute"}
    assert not (commands.folder / "runs").exists()


def test_compilation_without_cached_graphs_is_an_error(compile_only, monkeypatch):
    with loading.stand_in():
        from poptorch import executable

        monkeypatch.setattr(executable, "read_or_write", lambda graph: (None, False))
        with pytest.raises(DeviceError, match=r"PopTorch left nothing in .*cache"):
            compile_only()


def test_second_compilation_hits_the_cache(compile_only, commands, said):
    """On the stand-in only: the harness of the front end writes no cache."""
    with loading.stand_in():
        compile_only()
        files = cached(commands)
        assert len(files) == 2
        assert len({path.parent for path in files}) == 1, "one folder for a configuration"
        outcomes = [text for text in messages(said) if "graph: " in text]
        assert [text.rpartition(", ")[2] for text in outcomes] == [
            f"now in {files[0].parent}",
            f"now in {files[0].parent}",
        ]
        assert all("cache miss" in text for text in outcomes)
        said.clear()
        compile_only()
    again = [text for text in messages(said) if "graph: " in text]
    assert len(again) == 2
    assert all(f"cache hit in {files[0].parent}" in text for text in again)
    assert cached(commands) == files


@pytest.mark.parametrize(
    ("override", "is_another"),
    [
        ("optim.lr=0.5", False),
        ("run.seed=9", False),
        ("train.steps=8", False),
        ("engine.loader_mode=async", False),
        ("batch.gradient_accumulation=8", True),
        ("pipeline.layers_per_stage=[0, 2, 2, 0]", True),
        ("pipeline.recompute=every_layer", True),
        ("optim.accumulator=fp16", True),
        ("engine.partials=fp32", True),
        ("model.dropout=0.1", True),
    ],
)
def test_cache_folder_depends_on_the_shape_of_the_graphs(
    compile_only, commands, override, is_another
):
    with loading.stand_in():
        compile_only()
        compile_only(override)
    folders = {path.parent for path in cached(commands)}
    assert len(folders) == (2 if is_another else 1)


def test_run_logs_cache_hits_and_misses(commands, said):
    setting = f"engine.executable_cache={commands.folder / 'cache'}"
    with loading.stand_in():
        for expected in ("cache miss", "cache hit"):
            said.clear()
            commands.train(setting, "train.steps=1")
            outcomes = [text for text in messages(said) if "graph: " in text]
            assert len(outcomes) == 2
            assert all(expected in text for text in outcomes)
        said.clear()
        commands.train("train.steps=1")
    assert all("not cached" in text for text in messages(said) if "graph: " in text)


def test_compile_only_needs_a_cache(ipu, compile_only):
    with pytest.raises(ConfigError, match=r"engine\.executable_cache=null: --compile-only would"):
        compile_only("engine.executable_cache=null")


def test_broken_rules_are_reported_before_compilation(ipu, compile_only):
    with pytest.raises(ConfigError, match="less than the 7 pipeline stages"):
        compile_only("engine.name=auto", "batch.gradient_accumulation=4")
    assert compiled(ipu[1]) == []


def test_compile_only_needs_the_sdk(compile_only, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "poptorch", None)
    with pytest.raises(EngineUnavailable, match="source <sdk>/enable"):
        compile_only("engine.name=auto")
