"""torch.compile for the stages of a model (`engine.compile`): what it needs, and its errors."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

import torch
from torch import Tensor

from cxr_vit.config.schema import EngineSection
from cxr_vit.errors import DeviceError, EngineUnavailable
from cxr_vit.model.stages import StagedViT

#: The oldest torch that compiles one graph for all layers of a shape: it inlines their modules.
_OLDEST = (2, 5)
#: What torch.compile gets; with `fallback_random` dropout draws what it draws without compiling.
_COMPILER: Dict[str, Any] = {"backend": "inductor", "options": {"fallback_random": True}}


def check_compile(engine: EngineSection) -> None:
    """Raise EngineUnavailable if torch cannot compile here as `engine.compile` says."""
    problem = None if engine.compile == "off" else _problem(engine)
    if problem:
        raise EngineUnavailable(
            f"engine.compile={engine.compile} needs {problem}, or set engine.compile=off."
        )


def _problem(engine: EngineSection) -> Optional[str]:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return f"torch {oldest} or later; this is {torch.__version__}. Install a newer torch"
    if engine.device != "cpu" and torch.cuda.is_available():
        return None
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return (
            f"a C++ compiler on a CPU, and there is no {compiler} here. Install one (Debian,"
            " Ubuntu: apt install g++; Fedora, RHEL: dnf install gcc-c++; macOS: xcode-select"
            " --install), name another one with the environment variable CXX"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return (
            f"the headers of Python on a CPU, and there is no {header}. Install them (Debian,"
            " Ubuntu: apt install python3-dev; Fedora, RHEL: dnf install python3-devel)"
        )
    return None


def compile_stages(model: StagedViT, how: str) -> None:
    """Compile the stages of this process at their first use; `how` is `engine.compile`."""
    if how == "off":
        return
    import torch._dynamo

    # The graphs of a process are counted together; each stage has one to train and one to score.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    # It would cut a graph for DDP, and refuses recomputation.
    torch._dynamo.config.optimize_ddp = False

    def compiler(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled = torch.compile(function, fullgraph=True, dynamic=False, **_COMPILER)

        def call(*arguments: Any) -> Tensor:
            with explaining_compile_errors(how):
                result: Tensor = compiled(*arguments)
            return result

        return call

    model.compile_with(compiler, whole=how == "whole")


@contextlib.contextmanager
def explaining_compile_errors(how: str) -> Iterator[None]:
    """Raise DeviceError where torch cannot compile; other errors pass."""
    try:
        yield
    except Exception as error:
        of_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if how == "off" or not of_compiler:
            raise
        lines = str(error).strip().splitlines()
        # The first line may only name the backend, and the next one then says what it raised.
        reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(".")
        raise DeviceError(
            f"engine.compile={how}: torch cannot compile the model ({type(error).__name__}:"
            f" {reason}). Set engine.compile=off."
        ) from error
