"""Which options the compiler knows, and their types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from .errors import compiler_error
from .inspection import config

# Name -> kinds, recorded from PopTorch's sources by tests/fakes/conformance/record_api.py.
_KINDS_FILE = Path(__file__).with_name("session_options.json")

# Handled separately: they are not in the tables.
_SPECIAL = (
    "anchored_tensors",
    "available_memory_proportion",
    "compilation_progress_bar_fn",
    "patterns",
    "patterns_level",
)

_kinds: Optional[Dict[str, List[str]]] = None


def check_options(options: Mapping[str, Any]) -> None:
    """Raise for a name or a Python type that the compiler does not know."""
    global _kinds
    if not config().check_options:
        return
    if _kinds is None:
        _kinds = json.loads(_KINDS_FILE.read_text(encoding="utf-8"))
    for name, value in options.items():
        if name == "patterns" and "patterns_level" not in options:
            raise compiler_error(
                "PopART option 'patterns' should not be set without first setting 'patterns_level'."
            )
        if name not in _SPECIAL and not name.startswith("location_"):
            _check(name, value, _kinds.get(name, []))


def _check(name: str, value: Any, known: List[str]) -> None:
    # The Python type selects the table in which the name is looked up. bool is an int in Python.
    if isinstance(value, (set, list, tuple, dict)):
        if not value:
            return  # The name is looked up for each element.
        label, kind = ("map" if isinstance(value, dict) else "set / vector"), "container"
        items = [*value, *value.values()] if isinstance(value, dict) else list(value)
        if not all(isinstance(item, str) for item in items):
            raise TypeError(f"option {name}: {value!r} must hold only strings")
    elif isinstance(value, bool):
        label = kind = "bool"
    elif isinstance(value, float):
        label, kind = "floating point", "double"
    elif isinstance(value, int):
        label = kind = "uint64"
        if value < 0:
            raise TypeError(f"option {name}: {value} does not fit uint64")
    elif isinstance(value, str):
        label = kind = "string"
    else:
        raise compiler_error(f"Unknown value type {type(value)} for option {name}")
    if kind not in known:
        raise compiler_error(f"Unknown {label} option {name}")
