"""Load a Config from YAML files, left to right, and `section.key=value` overrides.

PyYAML reads `1e-3` as a string, `010` as 8 and `no` as False. Here every scalar stays text (or
null) until pydantic converts it to the type of its field, so that files and overrides mean the
same. File and line of each key are kept for error messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import yaml
from pydantic import ValidationError

from cxr_vit.config.help import explain
from cxr_vit.config.schema import SECTIONS, Config, Section
from cxr_vit.errors import ConfigError

__all__ = ["dump_config", "load_config"]

_COMMAND_LINE = "command line"
_NULL = {"", "~", "null", "Null", "NULL"}

#: Dotted key -> file and line, e.g. ``{"optim.lr": "configs/my.yaml:12"}``.
Places = Dict[str, str]


def load_config(files: Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """Merge configuration files and overrides, and validate the result.

    Parameters
    ----------
    files
        YAML files; later files win, lists are replaced whole.
    overrides
        ``section.key=value``, where the value is YAML; they win over every file.

    Raises
    ------
    ConfigError
        Listing every unknown or duplicate key, wrong type and value out of range.
    """
    merged: Dict[str, Any] = {}
    places: Places = {}
    problems: List[str] = []
    for file in files:
        _merge(merged, _read_file(file, places, problems))
    _merge(merged, _read_overrides(overrides, places, problems))
    config: Optional[Config] = None
    try:
        config = Config(**merged)
    except ValidationError as error:
        # A field of several types has one error per type: keep the first.
        first = {detail["loc"][:2]: detail for detail in reversed(error.errors(include_url=False))}
        problems += [explain(detail, places) for detail in reversed(list(first.values()))]
    if problems or config is None:
        raise ConfigError("\n".join(problems))
    return config


def dump_config(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back unchanged."""
    return str(yaml.safe_dump(config.model_dump(), sort_keys=False, default_flow_style=None))


def _read_file(file: Path, places: Places, problems: List[str]) -> Dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: cannot read the configuration: {getattr(error, 'strerror', None) or error}."
            " (An override is written section.key=value.)"
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
            f"{file}: a configuration has sections with keys, e.g. 'optim: {{lr: 1e-4}}'"
        )
    try:
        layer = _plain(node, "", lambda key: f"{file}:{key.start_mark.line + 1}", places, problems)
    except RecursionError as error:
        raise ConfigError(
            f"{file}: an alias (*name) contains itself. Write the value out."
        ) from error
    return _one_of_each_pair(_mappings_only(layer, places, problems), places, problems)


def _read_overrides(
    overrides: Sequence[str], places: Places, problems: List[str]
) -> Dict[str, Any]:
    """Read all overrides as one layer; the last value of a key counts."""
    layer: Dict[str, Any] = {}
    for text in overrides:
        for section, values in _read_override(text, places, problems).items():
            below = layer.get(section)
            if isinstance(values, dict) and isinstance(below, dict):
                values = {**below, **values}
            layer[section] = values
    return _one_of_each_pair(layer, places, problems)


def _read_override(text: str, places: Places, problems: List[str]) -> Dict[str, Any]:
    """Read ``section.key=value`` as a layer of one value."""
    key, equals, value = text.partition("=")
    section, _, name = key.strip().partition(".")
    if not equals or not section:
        problems.append(f"{_COMMAND_LINE}: {text!r} is not an override; write section.key=value")
        return {}
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        problems.append(f"{_COMMAND_LINE}: {text!r}: the value is not valid YAML")
        return {}
    places[key.strip()] = _COMMAND_LINE
    places.setdefault(section, _COMMAND_LINE)
    plain = None
    if node is not None:
        plain = _plain(node, key.strip(), lambda key_node: _COMMAND_LINE, places, problems)
    return _mappings_only({section: {name: plain} if name else plain}, places, problems)


def _plain(
    node: yaml.Node,
    path: str,
    place: Callable[[yaml.Node], str],
    places: Places,
    problems: List[str],
) -> Any:
    """Convert a YAML node to dicts, lists, text and None; record the place of each key."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in _NULL else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path, place, places, problems) for item in node.value]
    mapping: Dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        key_path = f"{path}.{key}" if path else key
        here = place(key_node)
        if key in mapping:
            problems.append(
                f"{here}: duplicate key '{key_path}', first given at {places[key_path]}. Keep one."
            )
        places[key_path] = here
        mapping[key] = _plain(value_node, key_path, place, places, problems)
    return mapping


def _mappings_only(layer: Dict[str, Any], places: Places, problems: List[str]) -> Dict[str, Any]:
    """Report and drop sections that are not mappings; an empty section counts as not given."""
    for name, section in SECTIONS.items():
        values = layer.get(name)
        if values is not None and not isinstance(values, dict):
            keys = ", ".join(list(section.model_fields)[:3])
            problems.append(
                f"{places[name]}: '{name}' is a section with keys ({keys}, ...), not {values!r}"
            )
        if not isinstance(values, dict):
            layer.pop(name, None)
    return layer


def _one_of_each_pair(layer: Dict[str, Any], places: Places, problems: List[str]) -> Dict[str, Any]:
    """Report exclusive keys given together; drop the second, so that other errors are found."""
    for name, section in SECTIONS.items():
        values = layer.get(name, {})
        for first, second in section.exclusive:
            if values.get(first) is not None and values.get(second) is not None:
                where = places[f"{name}.{second}"]
                problems.append(f"{where}: {name}: give '{first}' or '{second}', not both")
                del values[second]
    return layer


def _merge(base: Dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Update `base` with `layer`, key by key; drop the keys that `layer` makes invalid."""
    for section, values in layer.items():
        below = base.get(section)
        if not isinstance(values, dict) or not isinstance(below, dict):
            base[section] = values  # a new section, or an unknown key that pydantic will report
            continue
        known = SECTIONS.get(section, Section)
        for pair in known.exclusive:
            if any(values.get(key) is not None for key in pair):
                for key in pair:
                    below.pop(key, None)
        for key, owner in known.belongs_to.items():
            if owner in values:
                below.pop(key, None)
        below.update(values)
