"""Machine, versions and commit, which every benchmark writes beside its figures."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Dict

from cxr_vit.training.run_folder import git_commit

__all__ = ["describe_machine"]


def describe_machine(*packages: str) -> Dict[str, Any]:
    """Return facts about this machine and the versions of the given packages."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "measured": time.strftime("%Y-%m-%d"),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "git_commit": git_commit(),
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
