"""Find configuration files, by path or by the name of one that the package brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import yaml

from cxr_vit.config.schema import SECTIONS
from cxr_vit.errors import ConfigError, suggestion

_PACKAGE = Path(__file__).resolve().parents[1]
#: Beside the package in a checkout, inside it once installed.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def packaged_configs() -> Dict[str, Path]:
    """Return name -> path of the configurations that come with the package, those of data last."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def find_config(path: Path) -> Path:
    """Return the file that `path` means; raise ConfigError with near names if there is none.

    A file that exists wins, with or without `.yaml`. `vit_demo`, `vit_demo.yaml` and
    `configs/vit_demo.yaml` also mean the packaged file of that name.
    """
    with_suffix = path if path.suffix in (".yaml", ".yml") else Path(f"{path}.yaml")
    for candidate in (path, with_suffix):
        if candidate.exists() and not candidate.is_dir():  # a pipe is no file
            return candidate
    packaged = packaged_configs()
    name = with_suffix.with_suffix("").as_posix()
    name = name[len("configs/") :] if name.startswith("configs/") else name
    if name in packaged:
        return packaged[name]
    problem = "is a folder, not a file" if path.is_dir() else "there is no such file"
    raise ConfigError(f"{path}: {problem}.{_advice(path, name, list(packaged))}")


def _advice(path: Path, name: str, packaged: List[str]) -> str:
    if str(path).partition(".")[0] in SECTIONS:
        return f" An override is written {path}=value."
    here = [str(file) for pattern in ("*.yaml", "*.yml") for file in path.parent.glob(pattern)]
    near = suggestion(str(path), here) or suggestion(name, packaged)
    return f"{near} The package has {', '.join(packaged)}."


def overlay_text(overlay: Mapping[str, Any], comment: Sequence[str]) -> str:
    """Return sections and keys as the text of a configuration file, under comment lines."""
    text = "".join(f"# {line}".rstrip() + "\n" for line in comment)
    return text + str(yaml.safe_dump(overlay, sort_keys=False, default_flow_style=None))


def write_new(path: Path, text: str) -> None:
    """Write a configuration file; raise ConfigError if there is one already, or it cannot be."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        advice = "Name a new file, in a folder you may write to."
        raise ConfigError(f"{path}: cannot be written: {error.strerror}. {advice}") from error
