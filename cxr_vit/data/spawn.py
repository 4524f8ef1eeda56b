"""Start processes that do not run the user's script again."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType
from typing import Iterator


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Hide the script from the processes that are started within the context.

    A spawned process imports the script of its parent, to unpickle what is defined there. Without
    `if __name__ == "__main__":` it would run the script, and wait for its parent forever. What our
    processes call is defined in the package.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
