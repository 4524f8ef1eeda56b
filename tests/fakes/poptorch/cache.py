"""The executable cache: one file per executable, named by a hash of its inputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Optional, Tuple

from . import device

# These do not change the code on the device.
_IGNORED = ("cachePath", "random_seed")


def read_or_write(executable: Any) -> Tuple[Optional[Path], bool]:
    """Look `executable` up in the cache, add it, and return its file and whether it was there."""
    options = executable.options
    folder = options.get("cachePath")
    if not folder or not options.get("enableEngineCaching") or device.is_model(options):
        return None, False
    content = json.dumps(_describe(executable), sort_keys=True, default=str)
    name = hashlib.sha256(content.encode()).hexdigest()[:20]
    file = Path(folder) / f"{name}.popef"
    if file.exists():
        return file, file.read_text(encoding="utf-8") == content
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file, False


def _describe(executable: Any) -> Any:
    options = {str(key): value for key, value in executable.options.items() if key not in _IGNORED}
    weights = {
        name: [list(tensor.shape), str(tensor.dtype)]
        for name, tensor in executable.weights().items()
    }
    inputs = [[list(tensor.shape), str(tensor.dtype)] for tensor in executable.inputs.tensors]
    return {
        "options": options,
        "inputs": inputs,
        "blocks": executable.blocks,
        "training": executable.training,
        "weights": weights,
    }
