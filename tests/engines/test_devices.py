import pytest
import torch

from cxr_vit.config.schema import EngineSection
from cxr_vit.engines import devices as precision
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
def test_bf16_is_read_from_the_processors_flags(tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert precision.cpu_has_bf16(tmp_path / "cpuinfo") is expected


def test_a_system_that_does_not_say_has_no_bf16(tmp_path):
    assert not precision.cpu_has_bf16(tmp_path / "absent")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_cpu_takes_bf16_where_the_processor_has_it(without_cuda, monkeypatch, has_bf16, expected):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has_bf16)
    placement = precision.choose(EngineSection())
    assert (placement.device.type, placement.precision) == ("cpu", expected)
    assert "no CUDA device answers" in placement.reason


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), "bf16"), ((7, 5), "fp16")])
def test_gpu_takes_bf16_from_ampere_on_and_fp16_before(
    with_cuda, monkeypatch, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    placement = precision.choose(EngineSection())
    assert (placement.device.type, placement.precision) == ("cuda", expected)


@pytest.mark.parametrize("process", [0, 1])
def test_each_process_of_a_host_has_a_gpu_of_its_own(with_cuda, process):
    assert precision.choose(EngineSection(), process).device == torch.device("cuda", process)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(with_cuda, device):
    with pytest.raises(EngineUnavailable, match=r"process 3 of this host .* there are 2"):
        precision.choose(EngineSection(device=device), 2)
    assert precision.choose(EngineSection(device="cpu"), 2).device == torch.device("cpu")


def test_cpu_can_be_chosen_where_there_is_a_gpu(with_cuda):
    placement = precision.choose(EngineSection(device="cpu", precision="fp32"))
    assert placement.device.type == "cpu"
    assert placement.dtype == torch.float32


def test_cuda_without_a_device_says_what_to_do(without_cuda):
    with pytest.raises(EngineUnavailable, match=r"engine\.device=cuda.*engine\.device=cpu"):
        precision.choose(EngineSection(device="cuda"))


def test_fp16_on_a_cpu_needs_a_torch_with_a_scaler_for_it(without_cuda, monkeypatch):
    monkeypatch.delattr(torch.amp, "GradScaler", raising=False)
    with pytest.raises(EngineUnavailable, match=r"fp16.*bf16 or fp32"):
        precision.choose(EngineSection(precision="fp16"))
