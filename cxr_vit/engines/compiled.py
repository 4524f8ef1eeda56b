"""torch.compile for the stages of a model (`engine.compile`): what it needs, and its errors."""

from __future__ import annotations

import contextlib
import importlib.util
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
    on_gpu = engine.device != "cpu" and torch.cuda.is_available()
    where = "on a GPU" if on_gpu else "on a CPU"
    if on_gpu and importlib.util.find_spec("triton") is None:
        return f"triton {where}, and it is not installed. Install it (pip install triton)"
    if on_gpu:  # as triton chooses it
        language, variable, names = "C", "CC", ["gcc", "clang"]
    else:
        language, variable, names = "C++", "CXX", ["g++"]
        if sys.platform == "darwin":
            names = ["clang++"]
    names = [os.environ[variable]] if variable in os.environ else names
    if not any(map(shutil.which, names)):
        return (
            f"a {language} compiler {where}, and there is no {' or '.join(names)} here. Install"
            " one (Debian, Ubuntu: apt install g++; Fedora, RHEL: dnf install gcc-c++; macOS:"
            f" xcode-select --install), name another one with the environment variable {variable}"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return (
            f"the headers of Python {where}, and there is no {header}. Install them (Debian,"
            " Ubuntu: apt install python3-dev; Fedora, RHEL: dnf install python3-devel)"
        )
    return None


def compile_stages(model: StagedViT, how: str, with_ddp: bool = False) -> Callable[[], None]:
    """Compile the stages of this process at their first use; `how` is `engine.compile`.

    Returns
    -------
    Callable
        Undoes it, and torch's settings.
    """
    undo = contextlib.ExitStack()
    undo.callback(model.compile_with, lambda function: function, whole=False)
    if how == "off":
        undo.close()  # what an engine before this one compiled
        return undo.close
    import torch._dynamo

    # The graphs of a process are counted together; each stage has one to train and one to score.
    limit = max(64, torch._dynamo.config.cache_size_limit)
    settings = {"cache_size_limit": limit}
    if with_ddp:  # torch would cut a graph for DDP, and refuses recomputation then
        settings["optimize_ddp"] = False
    undo.enter_context(torch._dynamo.config.patch(settings))

    def compiler(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled = torch.compile(function, fullgraph=True, dynamic=False, **_COMPILER)

        def call(*arguments: Any) -> Tensor:
            with explaining_compile_errors(how):
                result: Tensor = compiled(*arguments)
            return result

        return call

    model.compile_with(compiler, whole=how == "whole")
    return undo.close


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
