"""PopART's cache of compiled graphs: a folder a configuration, and whether it was hit.

Many graphs of many configurations in one folder are slow to look through, and nobody knows which to
delete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Set

from cxr_vit.config.batching import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.model.stages import StagedViT

__all__ = ["ExecutableCache", "graph_shape"]

#: What the device can be given later, or never sees.
_VARIES = {
    "optim": {"lr", "weight_decay", "decay_all", "beta1", "beta2", "eps", "momentum"},
    "engine": {"name", "device", "executable_cache", "loader_mode", "ipu_version"},
}


def graph_shape(config: Config, model: StagedViT) -> Dict[str, Any]:
    """Return what the compiled graphs follow from."""
    shape: Dict[str, Any] = {
        name: getattr(config, name).model_dump(exclude=_VARIES.get(name))
        for name in ("pipeline", "optim", "engine")
    }
    shape["batch"] = asdict(BatchPlan.from_section(config.batch))
    shape["parameters"] = {
        name: list(parameter.shape) for name, parameter in model.hub_parameters()
    }
    shape["image_size"] = config.data.image_size
    shape["hidden_act"] = model.config.hidden_act
    shape["dropout"] = config.model.dropout
    return shape


class ExecutableCache:
    """The folder of one configuration's graphs.

    Parameters
    ----------
    root
        Folder of all; None for no cache.
    shape
        What the graphs follow from; JSON-able.
    """

    def __init__(self, root: Optional[str], shape: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()
        self.path: Optional[Path] = None if root is None else Path(root) / key[:12]
        self._before: Set[str] = set()
        self._written: Set[str] = set()

    def note(self) -> None:
        """Remember what is there before a compilation."""
        self._before = self._files()

    def outcome(self) -> str:
        """Say what the compilation since `note` did with the cache."""
        if self.path is None:
            return "not cached: engine.executable_cache=null"
        new = self._files() - self._before
        self._written |= new
        if new:
            return f"cache miss, now in {self.path}"
        found = self._before - self._written
        return f"cache hit in {self.path}" if found else f"nothing cached in {self.path}"

    @property
    def is_empty(self) -> bool:
        """Whether no graph is there."""
        return not self._files()

    def _files(self) -> Set[str]:
        """Return the graphs that are there (PopART calls them <hash>.popef)."""
        return set() if self.path is None else {path.name for path in self.path.glob("*.popef")}
