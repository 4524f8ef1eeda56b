"""What is planned for, and where its numbers are from."""

import os
import sys
import types

import pytest
import torch

from cxr_vit.config import read_config
from cxr_vit.planner import hardware
from cxr_vit.planner.hardware import ESTIMATES, IPUS, PUBLISHED, Sourced, find_target

from .shapes import DEMO, gpu4, pod4

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that torch can use."""
    properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30)
    monkeypatch.setattr(hardware, "_DRIVERS", (str(tmp_path),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


@pytest.mark.parametrize(
    ("overrides", "engine", "name"),
    [
        ([], "poptorch", "Mk2 IPU (GC200)"),
        (["engine.name=poptorch"], "poptorch", "Mk2 IPU (GC200)"),
        (["engine.name=poptorch", "planner.hardware=bow"], "poptorch", "Bow IPU"),
        (["engine.name=torch", "planner.hardware=bow"], "poptorch", "Bow IPU"),
        (["engine.name=torch"], "torch", "CPU"),
        (["engine.device=cpu"], "torch", "CPU"),
        (["engine.name=pipeline"], "pipeline", "CPU"),
        (["engine.name=pipeline", "engine.device=cuda"], "pipeline", "GPU"),
    ],
)
def test_target_follows_engine_and_hardware(overrides, engine, name):
    target = find_target(pod4(*overrides))
    assert (target.engine, target.name) == (engine, name)
    assert (target.ipu is None) == (engine != "poptorch")


def test_chosen_engine_wins_over_the_configuration():
    assert find_target(pod4(), "torch").name == "CPU"
    assert find_target(gpu4(), "poptorch").name == "Mk2 IPU (GC200)"


def test_gpu_is_read_from_the_machine(gpu):
    for config in (gpu4(), pod4("engine.name=torch")):
        target = find_target(config)
        assert (target.kind, target.name) == ("GPU", "NVIDIA H100 80GB HBM3")
        assert target.memory_bytes == 80 * 2**30
    assert find_target(read_config([DEMO], ["engine.device=cpu"])).name == "CPU"


def test_given_memory_wins_over_the_machines(gpu):
    target = find_target(gpu4("planner.device_memory_gib=24"))
    assert (target.name, target.memory_bytes) == ("GPU", 24 * 2**30)
    assert target.memory_source == "planner.device_memory_gib"


def test_memory_of_an_absent_gpu_is_unknown():
    assert find_target(gpu4()).memory_bytes is None


def test_processes_share_the_memory_of_a_cpu():
    assert find_target(read_config([DEMO])).memory_bytes == PHYSICAL
    four = find_target(gpu4("engine.device=cpu"))
    assert four.memory_bytes == PHYSICAL / 4
    assert four.memory_source == "read from this machine, divided by 4 processes"
    assert find_target(gpu4("engine.device=cpu", "batch.replicas=2")).memory_bytes == PHYSICAL / 8


def test_torch_is_not_imported_without_a_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import raises
    assert find_target(gpu4("engine.device=auto")).name == "CPU"


@pytest.mark.parametrize(
    ("device", "precision", "is_fp32"),
    [
        ("cpu", "auto", True),
        ("cpu", "bf16", False),
        ("cuda", "auto", False),
        ("cuda", "fp32", True),
    ],
)
def test_unknown_precision_is_fp32_on_a_cpu_only(device, precision, is_fp32):
    target = find_target(gpu4(f"engine.device={device}", f"engine.precision={precision}"))
    assert (target.precision, target.is_fp32) == (precision, is_fp32)


def test_devices_are_named():
    assert find_target(pod4()).of(4) == "4 x Mk2 IPU (GC200)"
    assert find_target(gpu4()).of(4) == "4 x GPU"
    assert find_target(gpu4("engine.device=cpu")).of(4) == "CPU, 4 processes"
    assert find_target(gpu4()).describe() == "engine pipeline on GPU in any precision"
    assert find_target(pod4()).describe() == "engine poptorch on Mk2 IPU (GC200) in fp16"


def test_every_number_has_a_source():
    for ipu in IPUS.values():
        numbers = [value for value in ipu if isinstance(value, Sourced)]
        assert len(numbers) == 10
        assert all(len(number.source) > 10 and number.value > 0 for number in numbers)
    assert all(len(number.source) > 10 for number in ESTIMATES.values())
    assert all(run.source and run.hardware in IPUS for run in PUBLISHED)


def test_an_ipu_has_897_mebibytes():
    # 1,472 tiles of 638,976 bytes (Bow-2000 datasheet; graphcore/popliner, parse_args.py)
    assert IPUS["mk2"].memory_bytes == IPUS["bow"].memory_bytes == 940_572_672
    assert IPUS["mk2"].memory_bytes / 2**20 == pytest.approx(897, abs=0.05)
