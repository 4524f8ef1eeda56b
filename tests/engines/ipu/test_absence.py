"""Choosing the engine without PopTorch, without an IPU, or without enough IPUs."""

from __future__ import annotations

import sys

import pytest

from cxr_vit.engines.choice import choose_engine
from cxr_vit.engines.ipu.graphs import explained
from cxr_vit.engines.ipu.options import poptorch_problem
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError, DeviceError, EngineUnavailable

from .commands import messages

SDK = "PopTorch is not installed or its SDK is not enabled"


def choices(commands, *overrides):
    """Return the reason for `auto`, and the error of `poptorch`."""
    auto = choose_engine(commands.config("engine.name=auto", *overrides), Launch())
    with pytest.raises(EngineUnavailable) as refused:
        choose_engine(commands.config("engine.name=poptorch", *overrides), Launch())
    assert auto.name == "torch"
    assert "\n" not in str(refused.value)
    return auto.reason, str(refused.value)


@pytest.fixture
def no_poptorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "poptorch", None)


def test_without_poptorch(no_poptorch, commands):
    reason, message = choices(commands)
    assert reason == f"no IPU: {SDK}"
    assert message.startswith(SDK)
    assert "engine.name=torch" in message
    assert "source <sdk>/enable" in message


def test_with_another_version_of_torch(commands, tmp_path, monkeypatch):
    text = "PopTorch 3.4.0 supports torch 2.0.1 only, but the installed version is 2.13.0"
    (tmp_path / "poptorch.py").write_text(f"assert False, {text!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "poptorch", raising=False)
    reason, message = choices(commands)
    assert text in reason
    assert message.startswith(f"PopTorch cannot be imported: {text}.")
    assert "pip install -r requirements-sdk34.txt" in message


def test_without_an_ipu(ipu, commands):
    ipu[1].config().hardware_version = 0
    reason, message = choices(commands)
    assert reason == "no IPU: PopTorch is installed, but no IPU answers"
    assert "gc-monitor" in message
    assert "--compile-only" in message


@pytest.mark.parametrize(
    ("there", "overrides", "wanted"),
    [
        (2, [], "4 stages x 1 replicas need 4 IPUs"),
        (4, ["batch.replicas=2"], "4 stages x 2 replicas need 8 IPUs"),
        (4, ["batch.replicas=3"], "4 stages x 3 replicas need 16 IPUs"),
        (
            2,
            ["pipeline.layers_per_stage=[2, 2]", "pipeline.eval_layers_per_stage=[1, 1, 1, 1]"],
            "4 stages x 1 replicas need 4 IPUs",
        ),
    ],
)
def test_with_too_few_ipus(ipu, commands, there, overrides, wanted):
    ipu[1].config().available_ipus = there
    reason, message = choices(commands, *overrides)
    assert reason.startswith(f"no IPU: {wanted}")
    assert message.startswith(wanted)
    assert "fewer stages" in message


def test_a_process_has_at_most_64_ipus(ipu, commands):
    ipu[1].config().available_ipus = 256
    sixteen = ["batch.replicas=16", "engine.name=poptorch"]
    assert choose_engine(commands.config(*sixteen), Launch()).is_ipu
    with pytest.raises(EngineUnavailable, match=r"68 IPUs.*at most 64\..*poprun.*=16 or fewer"):
        choose_engine(commands.config("batch.replicas=17", "engine.name=poptorch"), Launch())


def test_with_enough_ipus(ipu, commands):
    ipu[1].config().available_ipus = 4
    choice = choose_engine(commands.config("engine.name=auto"), Launch())
    assert (choice.name, choice.reason) == ("poptorch", "IPUs answer")
    assert choose_engine(commands.config("engine.name=poptorch"), Launch()).is_ipu


def test_ipu_model_is_refused(ipu, commands, monkeypatch):
    monkeypatch.setenv("POPTORCH_IPU_MODEL", "1")
    reason, message = choices(commands)
    assert "POPTORCH_IPU_MODEL selects the IPU Model" in reason
    assert "Unset it" in message
    monkeypatch.setenv("POPTORCH_IPU_MODEL", "0")
    assert choose_engine(commands.config("engine.name=auto"), Launch()).is_ipu


def test_explicit_torch_device_wins(ipu, commands):
    choice = choose_engine(commands.config("engine.name=auto", "engine.device=cpu"), Launch())
    assert not choice.is_ipu


def test_auto_on_ipus_reports_what_poptorch_refuses(ipu, commands):
    config = commands.config("engine.name=auto", "batch.gradient_accumulation=4")
    with pytest.raises(ConfigError, match=r"less than the 7 pipeline stages"):
        choose_engine(config, Launch())
    ipu[1].config().hardware_version = 0
    assert choose_engine(config, Launch()).name == "torch", "which has no such rule"


def test_auto_without_ipu_trains_on_torch_and_prints_the_reason(ipu, commands, capsys):
    ipu[1].config().hardware_version = 0
    run = commands.train("engine.name=auto", "train.steps=1")
    assert run.status == 0
    printed = capsys.readouterr().out
    assert (
        "torch engine on CPU in fp32 (no IPU: PopTorch is installed, but no IPU answers" in printed
    )
    assert "Encoder 3    --> stage 3" in printed


def test_unavailable_ipus_leave_no_run_folder(no_poptorch, commands):
    with pytest.raises(EngineUnavailable, match=SDK):
        commands.train()
    assert list(commands.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "kind", "advice"),
    [
        ("Failed to acquire 4 IPU(s)", EngineUnavailable, "POPTORCH_WAIT_FOR_IPU=1"),
        ("popart_exception: Out of memory on tile 7", DeviceError, "batch.micro_batch_size=1"),
        ("Memory allocation error", DeviceError, "engine.profile_dir"),
        ("Unsupported ops found in compiled model: [aten::foo]", DeviceError, "requirements-sdk34"),
        ("Unknown bool option enableFoo", DeviceError, "engine.poptorch_options"),
        ("something that nobody has seen", DeviceError, "POPTORCH_LOG_LEVEL=DEBUG"),
    ],
)
def test_error_message_has_the_action_poptorchs_text_and_advice(ipu, text, kind, advice):
    error = explained(RuntimeError(f"{text}\n"), "compiling the training graph")
    assert type(error) is kind
    first, *rest = str(error).split("\n")
    assert first == f"compiling the training graph: PopTorch says: {text}"
    assert advice in "\n".join(rest)


@pytest.mark.parametrize(
    ("action", "advice"),
    [
        ("IPU_RESET", "Recovery action IPU_RESET. Reset the IPUs (gc-reset)"),
        ("LINK_RESET", "Recovery action LINK_RESET. Reset the IPU-Links"),
        ("PARTITION_RESET", "vipu reset partition"),
        ("FULL_RESET", "Power cycle the system."),
        ("ANOTHER", "Recovery action ANOTHER. The last checkpoint is intact"),
    ],
)
def test_recoverable_error_names_its_recovery_action(ipu, commands, monkeypatch, action, advice):
    """PopTorch sets the attribute (poptorch.cpp, setRecoveryAction)."""
    poptorch, _ = ipu
    error = poptorch.RecoverableError("out of memory on the fabric")
    error.recovery_action = action

    def fail(executor, *inputs):
        raise error

    monkeypatch.setattr(poptorch.PoplarExecutor, "__call__", fail)
    with pytest.raises(DeviceError) as raised:
        commands.train()
    assert str(raised.value).startswith("training: PopTorch says: out of memory on the fabric\n")
    assert advice in str(raised.value)
    assert "--resume" in str(raised.value)


def test_unrecoverable_error_is_said_to_be(ipu):
    poptorch, _ = ipu
    error = explained(poptorch.UnrecoverableError("memory parity error"), "training")
    assert type(error) is DeviceError
    assert "unrecoverable and likely to persist" in str(error)


def test_ipus_held_by_others_are_a_user_error(ipu, commands, monkeypatch):
    """The IPUs answer when the engine is chosen, but not when the graph is compiled."""
    poptorch, inspection = ipu
    monkeypatch.setattr(poptorch, "ipuHardwareIsAvailable", lambda number=1: True)
    inspection.config().available_ipus = 2
    with pytest.raises(EngineUnavailable, match=r"compiling the inference graph: .*Failed to acq"):
        commands.train()


def test_unknown_error_in_a_step_becomes_a_device_error(ipu, commands, monkeypatch, said):
    poptorch, _ = ipu

    def fail(executor, *inputs):
        raise poptorch.Error("the IPU is on fire")

    monkeypatch.setattr(poptorch.PoplarExecutor, "__call__", fail)
    with pytest.raises(DeviceError, match="training: PopTorch says: the IPU is on fire") as raised:
        commands.train()
    assert "docs/ipu.md" in str(raised.value)
    assert isinstance(raised.value.__cause__, poptorch.Error)
    assert [text for text in messages(said) if text.startswith("training graph: ")]


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({4}, None),
        ({1, 2, 4}, None),
        ({8}, "fewer answer"),
        ({2}, "fewer answer"),
        (set(), "no IPU"),
    ],
)
def test_partition_may_have_devices_of_one_size(ipu, commands, monkeypatch, sizes, problem):
    """One that is not reconfigurable answers for its own number of IPUs only."""
    poptorch, _ = ipu
    monkeypatch.setattr(poptorch, "ipuHardwareIsAvailable", lambda number=1: number in sizes)
    found = poptorch_problem(commands.config())
    assert (found is None) if problem is None else (problem in str(found))
