"""Load a Config from YAML files, left to right, and `section.key=value` overrides.

PyYAML reads `1e-3` as a string, `010` as 8 and `no` as False. Here every scalar stays text (or
null) until pydantic converts it to the type of its field, so that files and overrides mean the
same. Only `args` of callbacks and loggers have no fields: there a scalar means what YAML says, and
`1e-3` is a number. File and line of each key are kept for error messages.

A file may come from anybody: no tag constructs an object, and size, depth and what aliases expand
to are limited.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import yaml
from pydantic import ValidationError

from cxr_vit.config.fields import Section
from cxr_vit.config.files import find_config
from cxr_vit.config.help import explain, is_merged, one_line
from cxr_vit.config.rules import check
from cxr_vit.config.schema import LISTS, SECTIONS, Config
from cxr_vit.errors import ConfigError
from cxr_vit.regular_files import read_bytes

#: One path or several.
Files = Union[str, Path, Sequence[Union[str, Path]]]

_COMMAND_LINE = "command line"
_NULL = {"", "~", "null", "Null", "NULL"}
#: Keys whose values have no fields.
_ARGS = [[name, "args"] for name in LISTS]
_FLOAT = "tag:yaml.org,2002:float"
#: Tags of the scalars that `args` hold as such; others, such as dates, stay text.
_TYPED = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", _FLOAT}
#: Bytes of a file, characters of an override; PyYAML reads about a million in a second.
_MOST_BYTES = 256 * 2**10
#: Nodes of a document, and levels of nodes.
_MOST_NODES, _MOST_LEVELS = 5000, 20
#: Characters of all values and dotted keys after aliases are expanded; a node counts as 20.
_MOST_TEXT = 2**20
#: Characters of a number in `args`; longer ones stay text, which Python need not convert.
_LONGEST_NUMBER = 100
#: Errors that are listed.
_MOST_PROBLEMS = 50
#: Characters that YAML forbids in a file, and that escapes must not bring in: they could not be
#: printed, or be a part of a path.
_UNPRINTABLE = yaml.reader.Reader.NON_PRINTABLE
#: Numbers that PyYAML takes for text: without a dot, or without the sign of the exponent.
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Takes `1e-3` for a number; stops at a document that takes long to read."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._levels = 0

    def compose_node(self, parent: Optional[yaml.Node], index: Any) -> Optional[yaml.Node]:
        """Compose the next node, as the base class does."""
        self._nodes += 1
        self._levels += 1
        for count, most, what in (
            (self._nodes, _MOST_NODES, "values"),
            (self._levels, _MOST_LEVELS, "levels"),
        ):
            if count > most:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.MarkedYAMLError(problem=f"over {most} {what}", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the text `1e-3`, which `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def load_config(files: Files, overrides: Sequence[str] = ()) -> Config:
    """Merge YAML files and overrides (``section.key=value``), and validate the result.

    `files` is one path or a list of paths. Later files win over earlier ones, and overrides over
    every file; lists are replaced whole, and `data.columns` is merged key by key. Raises
    ConfigError with every unknown or duplicate key, wrong type, value out of range and broken rule.
    """
    return check(read_config(files, overrides))


def read_config(files: Files, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration as `load_config` does, without the rules that involve several fields."""
    reader = _Reader()
    if isinstance(files, (str, Path)):
        files = [files]
    if isinstance(overrides, str):
        overrides = [overrides]
    merged: Dict[str, Any] = {}
    for file in files:
        _merge(merged, reader.read_file(Path(file)))
    _merge(merged, reader.read_overrides(overrides))
    problems, details = reader.problems, []
    try:
        config = Config(**merged)
    except ValidationError as error:
        # A field of several types has one error per type: keep the first, or one with its own text.
        kept: Dict[Tuple[Union[int, str], ...], Any] = {}
        for detail in error.errors(include_url=False):
            key = detail["loc"][: 3 if is_merged(detail["loc"]) else 2]
            if key not in kept or detail["type"] == "value_error" != kept[key]["type"]:
                kept[key] = detail
        details = list(kept.values())
    hidden = len(problems) + len(details) - _MOST_PROBLEMS
    for detail in details[: max(0, _MOST_PROBLEMS - len(problems))]:
        problems.append(explain(detail, reader.places))
    if problems:
        more = [f"and {hidden} more errors"] if hidden > 0 else []
        raise ConfigError("\n".join([*map(one_line, problems[:_MOST_PROBLEMS]), *more]))
    return config


def dump_config(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back unchanged."""
    values = config.model_dump(by_alias=True)
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None))


def read_yaml(file: Path) -> Tuple[Path, Optional[yaml.Node]]:
    """Return the file that `find_config` finds and its root, None if it is empty.

    Raises ConfigError if the file cannot be read, is no YAML, or is too large or too deep.
    """
    try:
        file = find_config(file)
        text = read_bytes(file, limit=_MOST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file}: cannot read the configuration: {reason}.") from error
    try:
        return file, _compose(text)
    except _NotYaml as error:
        line = "" if error.line is None else f":{error.line}"
        raise ConfigError(one_line(f"{file}{line}: not valid YAML: {error}")) from error


class _Reader:
    """Reads files and overrides as layers: section -> key -> dicts, lists, text and None."""

    def __init__(self) -> None:
        #: Dotted key -> file and line, e.g. ``{"optim.lr": "configs/my.yaml:12"}``.
        self.places: Dict[str, str] = {}
        #: Messages of all errors so far.
        self.problems: List[str] = []
        #: Characters read so far.
        self._text = 0

    def read_file(self, file: Path) -> Dict[str, Any]:
        file, node = read_yaml(file)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{file}: a configuration has sections with keys, e.g. 'optim: {{lr: 1e-4}}'"
            )
        layer = self._plain(node, "", lambda node: f"{file}:{node.start_mark.line + 1}")
        return self._one_of_each_group(self._mappings_only(layer))

    def read_overrides(self, overrides: Sequence[str]) -> Dict[str, Any]:
        """Read all overrides as one layer; the last value of a key counts."""
        layer: Dict[str, Any] = {}
        for text in overrides:
            for section, values in self._read_override(text).items():
                below = layer.get(section)
                if isinstance(values, dict) and isinstance(below, dict):
                    below.update(_merged(section, below, values))
                else:
                    layer[section] = values
        return self._one_of_each_group(layer)

    def _read_override(self, text: str) -> Dict[str, Any]:
        """Read ``section.key=value`` as a layer of one value."""
        key, equals, value = text.partition("=")
        key = key.strip()
        section, _, name = key.partition(".")
        if not equals or not section or _UNPRINTABLE.search(key):
            problem = f"{text!r} is not an override; write section.key=value"
            self.problems.append(f"{_COMMAND_LINE}: {problem}")
            return {}
        try:
            node = _compose(value)
        except _NotYaml as error:
            # Not at the end of a long value, which the message cuts off.
            problem = f"the value is not valid YAML: {error}"
            self.problems.append(f"{_COMMAND_LINE}: {one_line(repr(text))}: {problem}")
            return {}
        self.places[key] = _COMMAND_LINE
        self.places.setdefault(section, _COMMAND_LINE)
        plain = None if node is None else self._plain(node, key, lambda node: _COMMAND_LINE)
        name, _, inner = name.partition(".") if is_merged(key.split(".")) else (name, "", "")
        plain = {inner: plain} if inner else plain
        return self._mappings_only({section: {name: plain} if name else plain})

    def _plain(
        self, node: yaml.Node, path: str, place: Callable[[yaml.Node], str], level: int = 1
    ) -> Any:
        """Convert a YAML node to dicts, lists, text and None; record the place of each key."""
        self._text += 20 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if level > _MOST_LEVELS or self._text > _MOST_TEXT:
            problem = "aliases (*name) make the values too many. Write them out."
            raise ConfigError(f"{place(node)}: {problem}")
        if isinstance(node, yaml.ScalarNode):
            self._check(node, place)
            return scalar(node, is_typed=path.split(".")[:2] in _ARGS)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, path, place, level + 1) for item in node.value]
        mapping: Dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{here}: a key is a word, not a list or keys")
                continue
            self._check(key_node, place)
            key = key_node.value
            key_path = f"{path}.{key}" if path else key
            self._text += len(key_path)
            if key in mapping:
                first = f"first given at {self.places[key_path]}"
                self.problems.append(f"{here}: duplicate key '{key_path}', {first}. Keep one.")
            self.places[key_path] = here
            mapping[key] = self._plain(value_node, key_path, place, level + 1)
        return mapping

    def _check(self, node: yaml.ScalarNode, place: Callable[[yaml.Node], str]) -> None:
        """Raise ConfigError for text that cannot be printed."""
        found = _UNPRINTABLE.search(node.value)
        if found:
            problem = f"the character {found.group()!a} cannot be used here."
            raise ConfigError(f"{place(node)}: {problem}")

    def _mappings_only(self, layer: Dict[str, Any]) -> Dict[str, Any]:
        """Report and drop sections that are not mappings; an empty section counts as not given."""
        for name, section in SECTIONS.items():
            values = layer.get(name)
            if values is not None and not isinstance(values, dict):
                keys = f"keys ({', '.join(list(section.model_fields)[:3])}, ...)"
                where = self.places[name]
                self.problems.append(f"{where}: '{name}' is a section with {keys}, not {values!r}")
            if not isinstance(values, dict):
                layer.pop(name, None)
        return layer

    def _one_of_each_group(self, layer: Dict[str, Any]) -> Dict[str, Any]:
        """Report exclusive keys given together; drop the second, so that other errors are found."""
        for name, section in SECTIONS.items():
            values = layer.get(name, {})
            for group in section.exclusive:
                first, *others = [key for key in group if values.get(key) is not None] or [""]
                for other in others:
                    where = self.places[f"{name}.{other}"]
                    self.problems.append(f"{where}: {name}: give '{first}' or '{other}', not both")
                    del values[other]
        return layer


class _NotYaml(Exception):
    """The text is not valid YAML: what is wrong, in which line."""

    def __init__(self, problem: str, line: Optional[int] = None) -> None:
        super().__init__(problem)
        self.line = line


def _compose(text: str) -> Optional[yaml.Node]:
    """Return the root of a YAML document, None if it is empty; raise _NotYaml."""
    if len(text) > _MOST_BYTES:
        raise _NotYaml(f"{len(text):,} characters, more than the limit of {_MOST_BYTES:,}")
    try:
        node: Optional[yaml.Node] = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _NotYaml(
            str(error.problem or error.context), mark.line + 1 if mark else None
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _NotYaml(f"the character {chr(error.character)!a}", line) from error
    except (ValueError, OverflowError) as error:
        raise _NotYaml(r"an escape such as \U00110000 is no character") from error
    return node


def scalar(node: yaml.ScalarNode, *, is_typed: bool) -> Any:
    """Return text or None; with `is_typed`, also booleans and numbers. Quotes make text."""
    if node.style is None and node.value in _NULL:
        return None
    if is_typed and node.tag in _TYPED and len(node.value) <= _LONGEST_NUMBER:
        with contextlib.suppress(ValueError, LookupError, OverflowError):  # `!!int a`
            return yaml.constructor.SafeConstructor().construct_object(node)
    return node.value


def _merge(base: Dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Update `base` with `layer`, key by key; drop the keys that `layer` makes invalid."""
    for section, values in layer.items():
        below = base.get(section)
        if not isinstance(values, dict) or not isinstance(below, dict):
            base[section] = values  # a new section, or an unknown key that pydantic will report
            continue
        known = SECTIONS.get(section, Section)
        invalid = [key for key, owner in known.belongs_to.items() if owner in values]
        if below.get("format") == "table" and "format" not in values:
            # Names of files of a layout, in whatever root it is.
            invalid = [key for key in invalid if key not in ("csv", "join")]
        for key, switch in known.needs.items():
            off = known.model_fields[switch].default
            if str(values.get(switch)) in (str(off), f"{off:g}"):
                invalid.append(key)
        for group in known.exclusive:
            if any(values.get(key) is not None for key in group):
                invalid += group
        base[section] = {key: below[key] for key in below if key not in invalid}
        base[section].update(_merged(section, base[section], values))


def _merged(section: str, below: Mapping[str, Any], values: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the values of a section, with the keys of `below` in mappings that are merged."""
    merged = dict(values)
    for key in SECTIONS.get(section, Section).merged:
        if isinstance(values.get(key), dict) and isinstance(below.get(key), dict):
            merged[key] = {**below[key], **values[key]}
    return merged
