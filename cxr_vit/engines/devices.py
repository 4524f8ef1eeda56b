"""Which device and arithmetic a config gets on this machine, and why."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Dict, NamedTuple

import torch

from cxr_vit.config.schema import EngineSection
from cxr_vit.errors import EngineUnavailable

__all__ = ["Placement", "choose", "cpu_has_bf16"]

DTYPES: Dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_CPU_INFO = Path("/proc/cpuinfo")


class Placement(NamedTuple):
    """A device, an arithmetic and the reason in words."""

    device: torch.device
    precision: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic as a torch dtype."""
        return DTYPES[self.precision]


def choose(engine: EngineSection, local_rank: int = 0) -> Placement:
    """Choose the device and the arithmetic of this process.

    Parameters
    ----------
    engine
        The `engine` section.
    local_rank
        Which of its host's processes this is: each has a GPU of its own.

    Raises
    ------
    EngineUnavailable
        If the device or the arithmetic asked for is not to be had.
    """
    has_cuda = torch.cuda.is_available()
    if engine.device == "cuda" and not has_cuda:
        raise EngineUnavailable(
            "engine.device=cuda, but torch finds no CUDA device here. Set engine.device=cpu, or"
            " install a CUDA build of torch and check `nvidia-smi`."
        )
    device: str = engine.device
    if has_cuda and torch.cuda.device_count() == 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        local_rank = 0  # a scheduler that shows each process its own
    if device != "cpu" and has_cuda and local_rank >= torch.cuda.device_count():
        raise EngineUnavailable(
            f"process {local_rank + 1} of this host has no CUDA device: there are"
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
        precision = _cuda_default() if device == "cuda" else _cpu_default()
    if precision == "fp16" and device == "cpu" and not hasattr(torch.amp, "GradScaler"):
        raise EngineUnavailable(
            f"engine.precision=fp16 on a CPU needs torch 2.3 or later; this is {torch.__version__}."
            " Set engine.precision=bf16 or fp32."
        )
    place = f"cuda:{local_rank}" if device == "cuda" else device
    return Placement(torch.device(place), precision, why)


def _cuda_default() -> str:
    # Ampere and later multiply bf16 themselves; torch.cuda.is_bf16_supported counts emulation too.
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def _cpu_default() -> str:
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16(cpu_info: Path = _CPU_INFO) -> bool:
    """Whether the processor multiplies bf16 itself (AVX512-BF16, AMX, Arm BF16).

    Emulated bf16 is slower than fp32. Where the system does not say, the answer is no.
    """
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    known = {"avx512_bf16", "amx_bf16", "bf16"}
    return bool(flags and known & set(flags.group(1).split()))
