"""Run train.py or evaluate.py in a new process, with one implementation of PopTorch.

python tests/engines/ipu/launch.py "stand-in"|"front end" train|evaluate ARGUMENTS
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Optional

ROOT = Path(__file__).resolve().parents[3]


def start(
    which: str, program: str, *arguments: Any, more: Optional[Dict[str, str]] = None
) -> subprocess.Popen[str]:
    """Start the program in a new process group."""
    return subprocess.Popen(
        [sys.executable, __file__, which, program, *map(str, arguments)],
        cwd=str(ROOT),
        env={**os.environ, "OMP_NUM_THREADS": "1", **(more or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def main() -> None:
    which, program = sys.argv[1:3]
    del sys.argv[1:3]
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from fakes import loading

    with loading.stand_in() if which == "stand-in" else loading.frontend():
        from cxr_vit import cli

        cli.run(importlib.import_module(f"cxr_vit.commands.{program}").main)


if __name__ == "__main__":
    main()
