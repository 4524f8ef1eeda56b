"""The torch device and the precision of a process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, NamedTuple

import torch

from cxr_vit.config.schema import EngineSection
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import EngineUnavailable

DTYPES: Dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_CPU_INFO = Path("/proc/cpuinfo")


class DeviceChoice(NamedTuple):
    """A torch device, a precision, and the reason for the device."""

    device: torch.device
    precision: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The precision as a torch dtype."""
        return DTYPES[self.precision]

    @property
    def name(self) -> str:
        """``"CPU"`` or the GPU's name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return "CPU"


def choose_device(engine: EngineSection, launch: Launch) -> DeviceChoice:
    """Choose the device and the precision of this process; each process has its own GPU.

    Raises
    ------
    EngineUnavailable
        If the requested device or precision is not available.
    """
    has_cuda = torch.cuda.is_available()
    if engine.device == "cuda" and not has_cuda:
        raise EngineUnavailable(
            "engine.device=cuda, but torch finds no CUDA device here. Set engine.device=cpu, or"
            " install a CUDA build of torch and check `nvidia-smi`."
        )
    device: str = engine.device
    index = launch.local_rank
    if has_cuda and torch.cuda.device_count() == 1 and launch.local_world_size is None:
        index = 0  # a scheduler that shows each process only its own GPU
    if device != "cpu" and has_cuda and index >= torch.cuda.device_count():
        raise EngineUnavailable(
            f"process {index + 1} of this host has no CUDA device: there are"
            f" {torch.cuda.device_count()}. Start fewer processes (torchrun --nproc-per-node), or"
            " set engine.device=cpu."
        )
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
        why = "a CUDA device answers" if has_cuda else "no CUDA device answers"
    else:
        why = f"engine.device={device}"
    precision: str = engine.precision
    if precision == "auto":
        precision = _cuda_precision() if device == "cuda" else _cpu_precision()
    if precision == "fp16" and device == "cpu" and not hasattr(torch.amp, "GradScaler"):
        raise EngineUnavailable(
            f"engine.precision=fp16 on a CPU needs torch 2.3 or later; this is {torch.__version__}."
            " Set engine.precision=bf16 or fp32."
        )
    return DeviceChoice(
        torch.device(f"cuda:{index}" if device == "cuda" else device), precision, why
    )


def _cuda_precision() -> str:
    # Ampere and later have bf16 units; torch.cuda.is_bf16_supported counts emulation too.
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def _cpu_precision() -> str:
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16(cpu_info: Path = _CPU_INFO) -> bool:
    """Whether the processor has bf16 instructions (AVX512-BF16, AMX, Arm BF16).

    Emulated bf16 is slower than fp32. False where the system lists no flags.
    """
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    known = {"avx512_bf16", "amx_bf16", "bf16"}
    return bool(flags and known & set(flags.group(1).split()))
