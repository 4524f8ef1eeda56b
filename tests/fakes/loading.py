"""Import PopTorch for a test: the stand-in of this folder, or PopTorch's real front end.

Both are removed from sys.modules afterwards, so that no other test sees them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

import torch

FAKES = Path(__file__).resolve().parent
ROOT = FAKES.parents[1]

#: What the front end's harness does not model; docs/ipu.md, section 12, explains it.
GAPS = (
    "memory",
    "time",
    "the order of work in a pipeline",
    "stochastic rounding",
    "partial sums",
    "loss scaling",
    "the tanh form of GELU",
    "exclusive use of an IPU",
    "dropout in fp16",
)

# The harness can be installed only once per process, so its modules are kept between uses.
_kept: Dict[str, Any] = {}


@contextlib.contextmanager
def stand_in() -> Iterator[Tuple[Any, Any]]:
    """Make `import poptorch` import the stand-in.

    Yields
    ------
    tuple of module
        poptorch and its inspection.
    """
    before = _take_modules()
    sys.path.insert(0, str(FAKES))
    try:
        import poptorch
        from poptorch import inspection

        inspection.reset()
        yield poptorch, inspection
    finally:
        sys.path.remove(str(FAKES))
        _take_modules()
        sys.modules.update(before)


@contextlib.contextmanager
def frontend() -> Iterator[Tuple[Any, Any]]:
    """Make `import poptorch` import PopTorch's front end; yield it and the harness."""
    before = _take_modules()
    path, search_path, hook = list(sys.path), os.environ.get("PYTHONPATH"), sys.excepthook
    try:
        with warnings.catch_warnings():
            # Deprecations of a torch newer than the one the front end is written for.
            warnings.filterwarnings("ignore", "Positional args are being deprecated")
            warnings.filterwarnings("ignore", category=ResourceWarning)
            yield _install()
    finally:
        _kept["modules"] = _take_modules()
        sys.modules.update(before)
        sys.path[:] = path
        sys.excepthook = hook
        if search_path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = search_path


def _install() -> Tuple[Any, Any]:
    sys.modules.update(_kept.get("modules", {}))
    sys.path[:0] = _kept.get("path", [str(harness())])
    import poptorch_harness

    if "path" not in _kept:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            poptorch_harness.install()
        # Otherwise SIGTERM prints the traceback of every thread and does not end the process.
        faulthandler.unregister(signal.SIGTERM)
        _kept["path"] = [sys.path[0], str(harness())]
        _kept["PYTHONPATH"] = os.environ["PYTHONPATH"]
    # For the processes of asynchronous loaders.
    os.environ["PYTHONPATH"] = _kept["PYTHONPATH"]
    poptorch_harness.log().clear()
    config = poptorch_harness.config()
    config.available_ipus, config.hardware_version = 16, 2
    return sys.modules["poptorch"], poptorch_harness


def harness() -> Path:
    """Return the folder of the front end's harness, which may not exist."""
    default = ROOT.parent / "shared" / "tools" / "poptorch_frontend"
    return Path(os.environ.get("POPTORCH_FRONTEND", str(default)))


def available() -> Optional[str]:
    """Return why `frontend()` cannot be used, or None if it can."""
    source = os.environ.get("POPTORCH_SRC")
    if not source:
        return "POPTORCH_SRC is not set to a checkout of graphcore/poptorch"
    if not (Path(source) / "python" / "_poplar_executor.py").is_file():
        return f"POPTORCH_SRC={source} is no checkout of graphcore/poptorch"
    if not (harness() / "poptorch_harness.py").is_file():
        return f"{harness()} has no poptorch_harness.py (POPTORCH_FRONTEND)"
    if issubclass(torch.optim.AdamW, torch.optim.Adam):
        # Since torch 2.7. The front end would train with another optimizer than the given one.
        return f"PopTorch's front end takes AdamW for Adam on torch {torch.__version__}"
    return None


def _take_modules() -> Dict[str, Any]:
    """Remove poptorch and popdist from sys.modules and return them."""
    names = [name for name in sys.modules if _is_ours(name)]
    return {name: sys.modules.pop(name) for name in names}


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in ("poptorch", "popdist", "poptorch_harness")
