"""Choice of the engine on machines without IPUs; tests/engines/ipu has the others."""

import sys

import pytest
import torch

from conftest import engine_of, module_of
from cxr_vit.engines import process_group
from cxr_vit.engines.choice import choose_engine
from cxr_vit.engines.processes import Launch
from cxr_vit.engines.torch_engine import TorchEngine
from cxr_vit.errors import ConfigError, EngineUnavailable


@pytest.fixture(autouse=True)
def no_poptorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "poptorch", None)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["engine.name=torch"], "engine.name=torch"),
        (["engine.name=auto"], "engine.device is one of torch's"),
        (["engine.name=auto", "engine.device=auto"], "no IPU: PopTorch is not installed"),
    ],
)
def test_torch_engine_is_chosen_with_its_reason(make_config, overrides, reason):
    config = make_config(*overrides)
    chosen = choose_engine(config, Launch())
    assert (chosen.name, chosen.is_ipu) == ("torch", False)
    assert chosen.reason.startswith(reason)
    with engine_of(config, module_of(config)) as engine:
        assert isinstance(engine, TorchEngine)
        assert f"({chosen.reason}; " in engine.describe()


def test_pipeline_engine_needs_a_newer_torch(make_config, monkeypatch):
    config = make_config("engine.name=pipeline", "batch.gradient_accumulation=4")
    monkeypatch.setattr(torch, "__version__", "2.0.1+cpu")
    with pytest.raises(EngineUnavailable, match=r"needs torch 2\.10 or later; this is 2\.0\.1"):
        choose_engine(config, Launch())
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with pytest.raises(ConfigError, match="needs 4 processes"):
        choose_engine(config, Launch())
    assert choose_engine(config, Launch(0, 4, launcher="torchrun")).name == "pipeline"


def test_processes_that_do_not_fit_are_refused(make_config):
    config = make_config("engine.name=torch", "batch.replicas=2")
    assert choose_engine(config, Launch(0, 2, launcher="torchrun")).name == "torch"
    with pytest.raises(ConfigError, match="torchrun started 3 processes"):
        choose_engine(config, Launch(0, 3, launcher="torchrun"))
    assert choose_engine(config, Launch(0, 3, launcher="poprun")).name == "torch", "not connected"


def test_processes_on_different_devices_are_refused(make_config, monkeypatch):
    config = make_config("engine.name=torch")
    words = ["engine.precision=bf16 here, fp32 there"]
    monkeypatch.setattr(process_group.Coordinator, "differences", lambda store, name, facts: words)
    with pytest.raises(ConfigError, match=r"engine\.precision=bf16 here, fp32 there"):
        engine_of(config, None)
