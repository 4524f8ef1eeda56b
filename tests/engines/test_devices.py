import pytest
import torch

from cxr_vit.config.schema import EngineSection
from cxr_vit.engines import devices
from cxr_vit.engines.devices import choose_device
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import EngineUnavailable


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("Features : fp asimd bf16 i8mm\n", True),
        ("flags : fpu avx2 avx512f\n", False),
        ("model name : bf16 in a name\nflags : fpu\n", False),
        ("", False),
    ],
)
def test_bf16_is_read_from_processor_flags(tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert devices.cpu_has_bf16(tmp_path / "cpuinfo") is expected


def test_system_without_cpuinfo_has_no_bf16(tmp_path):
    assert not devices.cpu_has_bf16(tmp_path / "absent")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_cpu_uses_bf16_where_the_processor_has_it(without_cuda, monkeypatch, has_bf16, expected):
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: has_bf16)
    choice = choose_device(EngineSection(), Launch())
    assert (choice.device.type, choice.name, choice.precision) == ("cpu", "CPU", expected)
    assert "no CUDA device answers" in choice.reason


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), "bf16"), ((7, 5), "fp16")])
def test_gpu_uses_bf16_from_ampere_on_and_fp16_before(with_cuda, monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    choice = choose_device(EngineSection(), Launch())
    assert (choice.device.type, choice.precision) == ("cuda", expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_of_a_host_has_its_own_gpu(with_cuda, rank):
    choice = choose_device(EngineSection(), Launch(local_rank=rank))
    assert choice.device == torch.device("cuda", rank)


def test_scheduler_may_show_each_process_only_its_own_gpu(with_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    choice = choose_device(EngineSection(), Launch(local_rank=1))
    assert choice.device == torch.device("cuda", 0)
    with pytest.raises(EngineUnavailable, match=r"process 2 of this host .* there are 1"):
        choose_device(EngineSection(), Launch(local_rank=1, local_world_size=2))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(with_cuda, device):
    launch = Launch(local_rank=2)
    with pytest.raises(EngineUnavailable, match=r"process 3 of this host .* there are 2"):
        choose_device(EngineSection(device=device), launch)
    assert choose_device(EngineSection(device="cpu"), launch).device == torch.device("cpu")


def test_cpu_can_be_chosen_where_there_is_a_gpu(with_cuda):
    choice = choose_device(EngineSection(device="cpu", precision="fp32"), Launch())
    assert choice.device.type == "cpu"
    assert choice.dtype == torch.float32


def test_cuda_without_a_device_is_refused_with_advice(without_cuda):
    with pytest.raises(EngineUnavailable, match=r"engine\.device=cuda.*engine\.device=cpu"):
        choose_device(EngineSection(device="cuda"), Launch())


def test_fp16_on_a_cpu_needs_a_torch_with_a_scaler_for_it(without_cuda, monkeypatch):
    monkeypatch.delattr(torch.amp, "GradScaler", raising=False)
    with pytest.raises(EngineUnavailable, match=r"fp16.*bf16 or fp32"):
        choose_device(EngineSection(precision="fp16"), Launch())
