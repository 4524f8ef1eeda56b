"""The command `import-ipu-config`: Graphcore's configuration files in our terms."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

from cxr_vit.cli import COMMANDS, Parser, program
from cxr_vit.config import check, read_config
from cxr_vit.config.files import overlay_text, write_new
from cxr_vit.config.graphcore_keys import EXAMPLE, IPU_CONFIG, Imported, translate
from cxr_vit.config.help import one_line
from cxr_vit.config.ipu_rules import ipu_problems, ipu_warnings
from cxr_vit.config.loader import read_yaml, scalar
from cxr_vit.errors import ConfigError, suggestion
from cxr_vit.regular_files import read_json

#: What an overlay is for.
_BASE = "configs/vit_pod4.yaml"
_IPU_CONFIG_NAME, _EXAMPLE_NAME = "ipu_config.json", "configs.yml"
#: Bytes of an ipu_config.json, whose longest known has 2 kB.
_MOST_BYTES = 64 * 2**10
#: Levels of merges (`<<: *base`) in a configs.yml.
_MOST_MERGES = 20
#: Machines of older IPUConfigs, in which a key may have a value for each: {"pod4": 1, ...}.
_PODS = ("pod4", "pod8", "pod16", "pod32", "pod64", "default")
#: Unknown keys that are listed.
_MOST_UNKNOWN = 50


def import_ipu_config(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("import-ipu-config", description=COMMANDS["import-ipu-config"].summary)
    add = parser.add_argument
    text = "an ipu_config.json or a configs.yml, or a folder that holds one"
    add("file", type=Path, metavar="FILE", help=text)
    text = "entry of a configs.yml; of an older ipu_config.json the POD, e.g. pod16"
    add("--entry", metavar="NAME", help=text)
    add("--write", type=Path, metavar="FILE", help="write the overlay there, not to the screen")
    arguments = parser.parse(argv)
    if arguments.write and arguments.write.exists():
        raise ConfigError(f"--write {arguments.write}: exists. Name a new file, or remove it.")
    if arguments.entry is None and _is_example(arguments.file):
        names = [one_line(name) for name in _entries(arguments.file)]
        if arguments.write:
            raise ConfigError(f"--write needs --entry NAME, one of {', '.join(names)}.")
        print("entries; name one with --entry:", *names, sep="\n  ")
        return 0
    imported = import_file(arguments.file, arguments.entry)
    print(*_report(imported), sep="\n")
    problems, warnings = _checked(imported)
    if warnings:
        print("", *(f"warning: {one_line(warning)}" for warning in warnings), sep="\n")
    text = overlay_text(imported.overlay, _comment(imported, arguments.write, problems))
    if arguments.write:
        write_new(arguments.write, text)
        print(f"\nwritten: {arguments.write}")
    else:
        print(f"\noverlay:\n\n{text}", end="")
    if problems:
        raise ConfigError("\n".join(problems))
    return 0


# Reading


def import_file(path: Path, entry: Optional[str] = None) -> Imported:
    """Read an IPUConfig, or an entry of a configs.yml; a folder means the one that is in it.

    Raises ConfigError if the file cannot be read, or a value is of a wrong type.
    """
    path = _find(path)
    if _is_example(path):
        found = _entries(path)
        if entry not in found:
            hint = suggestion(str(entry), found)
            raise ConfigError(one_line(f"{path}: no entry {entry!r}.{hint}"))
        source = f"{path}, entry {entry} of Graphcore's ViT example"
        return translate(source, _values(path, found[entry]), EXAMPLE)
    try:
        values = read_json(path, limit=_MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(one_line(f"{path}: cannot read an IPUConfig: {reason}.")) from error
    pods = {pod for value in values.values() if _is_by_pod(value) for pod in value}
    if entry is not None and entry not in pods:
        has = f"it has {', '.join(sorted(pods))}" if pods else "it has no values by POD"
        raise ConfigError(one_line(f"{path}: no entry {entry!r}; {has}."))
    values = {key: _of_pod(path, key, values[key], entry or "default") for key in values}
    which = f", values for {entry or 'default'} of {', '.join(sorted(pods))}" if pods else ""
    return translate(f"{path}, an IPUConfig of optimum-graphcore{which}", values, IPU_CONFIG)


def _find(path: Path) -> Path:
    """Return the file itself, or the one in a folder."""
    try:
        if not path.is_dir():
            if path.exists():
                return path
            raise ConfigError(one_line(f"{path}: there is no such file."))
        for name in (_IPU_CONFIG_NAME, _EXAMPLE_NAME):
            if (path / name).exists():
                return path / name
    except (OSError, ValueError) as error:
        raise ConfigError(one_line(f"{path}: cannot be read: {error}.")) from error
    raise ConfigError(one_line(f"{path}: has neither {_IPU_CONFIG_NAME} nor {_EXAMPLE_NAME}."))


def _is_example(path: Path) -> bool:
    """Whether a path names a configs.yml, by its suffix or, for a folder, by what is in it."""
    if path.is_dir():
        path = _find(path)
    return path.suffix in (".yml", ".yaml")


def _is_by_pod(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and set(value) <= set(_PODS)


def _of_pod(path: Path, key: str, value: Any, pod: str) -> Any:
    """Return the value for a POD, where a key has one for each; as optimum-graphcore did."""
    if not _is_by_pod(value):
        return value
    if pod not in value:
        choices = ", ".join(value)
        problem = f"{path}: {key} has no value for {pod}. Choose with --entry: {choices}."
        raise ConfigError(one_line(problem))
    return value[pod]


def _entries(path: Path) -> Dict[str, yaml.MappingNode]:
    """Return the entries of a configs.yml by name."""
    path, root = read_yaml(_find(path))
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    found = {
        name.value: value
        for name, value in pairs
        if isinstance(name, yaml.ScalarNode) and isinstance(value, yaml.MappingNode)
    }
    if not found:
        raise ConfigError(one_line(f"{path}: has no entries, 'name: {{key: value, ...}}'."))
    return found


def _values(path: Path, entry: yaml.MappingNode) -> Dict[str, Any]:
    """Return the values of an entry, with those that it merges (`<<: *base`)."""
    done: Dict[int, Dict[str, yaml.Node]] = {}

    def merged(node: yaml.Node, level: int = 1) -> Dict[str, yaml.Node]:
        place = f"{path}:{node.start_mark.line + 1}"
        if not isinstance(node, yaml.MappingNode) or level > _MOST_MERGES:
            problem = f"{place}: '<<' merges other entries, at most {_MOST_MERGES} deep."
            raise ConfigError(one_line(problem))
        if id(node) not in done:
            bases: List[yaml.Node] = []
            own = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(one_line(f"{place}: a key is a word, not a list or keys."))
                if key.value == "<<":
                    bases += value.value if isinstance(value, yaml.SequenceNode) else [value]
                else:
                    own[key.value] = value
            found: Dict[str, yaml.Node] = {}
            for base in reversed(bases):  # the first one wins
                found.update(merged(base, level + 1))
            done[id(node)] = {**found, **own}
        return done[id(node)]

    return {key: _plain(node) for key, node in merged(entry).items()}


def _plain(node: yaml.Node) -> Any:
    """Return a scalar, or a list of them; of deeper values only that they are there."""
    if isinstance(node, yaml.ScalarNode):
        return scalar(node, is_typed=True)
    if isinstance(node, yaml.SequenceNode):
        is_flat = all(isinstance(item, yaml.ScalarNode) for item in node.value)
        return [scalar(item, is_typed=True) for item in node.value] if is_flat else [[]]
    return {}


# Printing


def _report(imported: Imported) -> List[str]:
    """Return one line per key, and the unknown ones."""
    lines = [one_line(imported.source), ""]
    lines += [str(line) for line in imported.lines if not line.is_default]
    defaults = [str(line) for line in imported.lines if line.is_default]
    if defaults:
        lines += ["", "not in the file, so their default:", *defaults]
    if imported.unknown:
        shown = imported.unknown[:_MOST_UNKNOWN]
        more = len(imported.unknown) - len(shown)
        lines += ["", "unknown, and left out:", *map(one_line, shown)]
        lines += [f"and {more} more"] if more else []
    return lines


def _checked(imported: Imported) -> Tuple[List[str], List[str]]:
    """Return the problems that `check` has with the base and the overlay, and its warnings."""
    overrides = [
        f"{section}.{key}={json.dumps(value, ensure_ascii=False)}"
        for section, keys in imported.overlay.items()
        for key, value in keys.items()
    ]
    try:
        config = check(read_config(_BASE, overrides))
    except ConfigError as error:
        # The overrides are none that somebody typed.
        lines = [line.replace("command line: ", "", 1) for line in str(error).split("\n")]
        return [*imported.problems, *lines], []
    problems = [one_line(str(problem)) for problem in ipu_problems(config)]
    return [*imported.problems, *problems], list(map(str, ipu_warnings(config)))


def _comment(imported: Imported, path: Path, problems: Sequence[str]) -> List[str]:
    name = shlex.quote(str(path or "overlay.yaml"))
    lines = [one_line(f"{program('train')} --config {_BASE} {name}"), ""]
    lines.append(one_line(f"From {imported.source},"))
    lines.append(f"by {program('import-ipu-config')}.")
    if problems:
        lines += ["", "To correct:", *problems]
    return lines
