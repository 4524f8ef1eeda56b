"""YAML files, left to right, then `section.key=value` overrides -> Config.

PyYAML reads `1e-3` as a string, `010` as 8 and `no` as False. Here every scalar stays text (or
null) until the declared type of its field turns it into a number, so a file and an override mean
the same. Each value remembers its file and line for the error messages. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import yaml
from pydantic import ValidationError

from cxr_vit.config.explain import explain
from cxr_vit.config.schema import SECTIONS, Config
from cxr_vit.errors import ConfigError

__all__ = ["dump_config", "load_config"]

_NULL = {"", "~", "null", "Null", "NULL"}

#: Dotted key -> where it was given, e.g. ``{"optim.lr": "configs/my.yaml:12"}``.
Places = Dict[str, str]


def load_config(files: Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """Read and merge configuration files and overrides, and validate the result.

    Parameters
    ----------
    files
        YAML files; a later one wins over an earlier one, lists are replaced whole.
    overrides
        ``section.key=value`` texts; the value is YAML and wins over every file.

    Raises
    ------
    ConfigError
        Listing every unknown or duplicate key, wrong type and value out of range at once.
    """
    merged: Dict[str, Any] = {}
    places: Places = {}
    problems: List[str] = []
    for file in files:
        layer = _read_file(file, places, problems)
        _merge(merged, layer)
    _merge(merged, _read_overrides(overrides, places, problems))
    config: Optional[Config] = None
    try:
        config = Config(**merged)
    except ValidationError as error:
        problems += [explain(detail, places) for detail in error.errors(include_url=False)]
    if problems or config is None:
        raise ConfigError("\n".join(problems))
    return config


def dump_config(config: Config) -> str:
    """Write a config as YAML that `load_config` reads back to an equal one."""
    return str(yaml.safe_dump(config.model_dump(), sort_keys=False, default_flow_style=None))


def _read_file(file: Path, places: Places, problems: List[str]) -> Dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: cannot read the configuration: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{file}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{file}: a configuration is sections with keys, e.g. 'optim: {{lr: 1e-4}}'"
        )
    layer = _plain(node, "", str(file), places, problems)
    for section, value in list(layer.items()):
        if value is None and section in SECTIONS:
            del layer[section]  # `train:` with every key commented out
    return dict(layer)


def _plain(node: yaml.Node, path: str, file: str, places: Places, problems: List[str]) -> Any:
    """Turn a YAML node into dicts, lists, text and None, and note where each key stands."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in _NULL else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path, file, places, problems) for item in node.value]
    mapping: Dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        key_path = f"{path}.{key}" if path else key
        here = f"{file}:{key_node.start_mark.line + 1}"
        if key in mapping:
            problems.append(
                f"{here}: duplicate key '{key_path}', first given at {places[key_path]}. Keep one."
            )
        places[key_path] = here
        mapping[key] = _plain(value_node, key_path, file, places, problems)
    return mapping


def _read_overrides(
    overrides: Sequence[str], places: Places, problems: List[str]
) -> Dict[str, Any]:
    layer: Dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(f"command line: {text!r} is not an override; write section.key=value")
            continue
        try:
            node = yaml.compose(value, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            problems.append(f"command line: {text!r}: the value is not valid YAML")
            continue
        section, _, name = key.partition(".")
        places[key] = "command line"
        plain = None if node is None else _plain(node, key, "command line", {}, problems)
        if name:
            layer.setdefault(section, {})[name] = plain
        else:
            layer[section] = plain
    return layer


def _merge(base: Dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Lay `layer` over `base`: sections key by key, and the later of an exclusive pair wins."""
    for section, values in layer.items():
        below = base.get(section)
        if not isinstance(values, dict) or not isinstance(below, dict):
            base[section] = dict(values) if isinstance(values, dict) else values
            continue
        for pair in _exclusive_pairs(section):
            if any(values.get(key) is not None for key in pair):
                for key in pair:
                    below.pop(key, None)
        below.update(values)


def _exclusive_pairs(section: str) -> Tuple[Tuple[str, str], ...]:
    return SECTIONS[section].exclusive if section in SECTIONS else ()
