"""Text about fields: what each allows, for `--help` and for error messages."""

from __future__ import annotations

import json
import re
from typing import Any, List, Mapping, Sequence, Union

from pydantic.fields import FieldInfo
from typing_extensions import Annotated, Literal, get_args, get_origin

from cxr_vit.config.columns import Words
from cxr_vit.config.fields import Section
from cxr_vit.config.schema import LISTS, SECTIONS, Config
from cxr_vit.errors import did_you_mean, suggestion

_TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

#: Characters of a message.
_LONGEST_PROBLEM = 1000
#: Names in other code bases -> our key.
_SYNONYMS = {
    "learning_rate": "optim.lr",
    "batch_size": "batch.micro_batch_size",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.gradient_accumulation",
    "grad_accum": "batch.gradient_accumulation",
    "replication_factor": "batch.replicas",
    "layers_per_ipu": "pipeline.layers_per_stage",
    "inference_layers_per_ipu": "pipeline.eval_layers_per_stage",
    "inference_device_iterations": "batch.eval_device_iterations",
    "matmul_proportion": "pipeline.available_memory_proportion",
    "recompute_checkpoint_every_layer": "pipeline.recompute",
    "executable_cache_dir": "engine.executable_cache",
    "enable_half_partials": "engine.partials",
    "optimizer_state_offchip": "engine.optimizer_state_on_chip",
    "auto_loss_scaling": "optim.loss_scaling",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "output_dir": "run.dir",
    "blr": "optim.base_lr",
    "drop_path_rate": "model.drop_path",
    "global_pool": "model.pooling",
    "aa": "augment.rand_augment",
    "tta": "evaluation.views",
    "seed": "run.seed",
}
#: Values in other code bases -> ours.
_VALUES = {"asl": "asymmetric", "avg": "mean", "cls": "class", "token": "class"}


def is_merged(location: Sequence[Any]) -> bool:
    """Whether a location is inside a mapping whose keys are merged: ``data.columns.patient``."""
    return len(location) > 2 and location[1] in SECTIONS.get(location[0], Section).merged


def explain(detail: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """Convert an error of pydantic into a line: where, what was given, what is allowed.

    `detail` is an item of `ValidationError.errors()`; `places` is dotted key -> file and line.
    """
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location[: 3 if is_merged(location) else 2])
    place = places.get(key) or places.get(".".join(location[:2])) or places.get(location[0])
    where = f"{place}: " if place else ""
    if location[0] in LISTS:
        field = Config.model_fields[location[0]]
        return f"{where}{location[0]}: must be {allowed(field)}; wrong is {detail['input']!r}."
    if detail["type"] == "extra_forbidden":
        return where + _unknown(location)
    field = SECTIONS[location[0]].model_fields[location[1]]
    if is_merged(location):
        if detail["type"] == "missing":
            return f"{where}{key} is missing: {location[0]}.{location[1]} is {allowed(field)}."
        field = SECTIONS[location[0]].merged[location[1]].model_fields[location[2]]
    where += f"{key}={_written(detail['input'])}"
    if detail["type"] == "value_error":
        return f"{where}: {detail['ctx']['error']}"
    is_choice = detail["type"] == "literal_error"
    given = str(detail["input"])
    hint = suggestion(_VALUES.get(given, given), _choices(field.annotation)) if is_choice else ""
    return f"{where}: must be {allowed(field)}.{hint}"


def one_line(problem: str) -> str:
    """Return a message that fits on a terminal, whatever values it quotes."""
    if len(problem) > _LONGEST_PROBLEM:
        problem = f"{problem[: _LONGEST_PROBLEM // 2]} ... {problem[-_LONGEST_PROBLEM // 2 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in problem)


def _written(value: Any) -> str:
    """Return a value as it is written in YAML; quoted only if it could be overlooked."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = str(value)
    return text if text and text == text.strip() else repr(text)


def _unknown(location: List[str]) -> str:
    """Return the message for an unknown key, with the nearest known one."""
    section, name = location[0], location[-1]
    siblings = SECTIONS[section].model_fields if section in SECTIONS else {}
    if is_merged(location):
        section, siblings = (
            ".".join(location[:2]),
            SECTIONS[section].merged[location[1]].model_fields,
        )
    sibling = did_you_mean(name, siblings)
    elsewhere = [f"{other}.{name}" for other in SECTIONS if name in SECTIONS[other].model_fields]
    near = _SYNONYMS.get(name)  # first: "blr" is nearest to "lr", another quantity
    if near is None and sibling:
        near = f"{section}.{sibling}"
    elif near is None:
        near = next(iter(elsewhere), _SYNONYMS.get(did_you_mean(name, _SYNONYMS) or ""))
    if near is None and len(location) == 1:
        near = did_you_mean(section, [*SECTIONS, *LISTS])
    hint = f"Did you mean '{near}'?" if near else "See train.py --help for all keys."
    return f"unknown key '{'.'.join(location)}'. {hint}"


def allowed(field: FieldInfo) -> str:
    """Return what a field allows, e.g. ``"integer >= 1"`` or ``"one of auto, official"``."""
    words = _type_words(field.annotation, field.metadata)
    return words + (" or null" if type(None) in get_args(field.annotation) else "")


def _type_words(annotation: Any, metadata: Sequence[Any]) -> str:
    """Describe a type with its bounds, which are beside it or inside its Annotated."""
    for note in metadata:
        if isinstance(note, Words):
            return note.text
    if get_origin(annotation) is Union:
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return " or ".join(_type_words(part, metadata) for part in parts)
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        more = [item for note in notes for item in getattr(note, "metadata", [note])]
        return _type_words(inner, [*metadata, *more])
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(_choices(annotation))
    if get_origin(annotation) is list:
        items = re.sub(r"^(integer|number)", r"\1s", _type_words(get_args(annotation)[0], []))
        return f"a list of {items}{_bounds(metadata)}"
    return f"{_TYPES[annotation]}{_bounds(metadata)}"


def _bounds(metadata: Sequence[Any]) -> str:
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in _BOUNDS.items()
        if hasattr(item, name)
    ]
    text = f" {', '.join(limits)}" if limits else ""
    for item in metadata:
        if getattr(item, "min_length", None):
            text += ", not empty"
        if getattr(item, "pattern", None):
            text += f" matching {item.pattern}"
    return text


def _choices(annotation: Any) -> List[str]:
    """Return the values of a Literal, also inside a Union or a list."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def help_text() -> str:
    """Return all sections and fields with type, range, default and description."""
    lines: List[str] = []
    for name, section in SECTIONS.items():
        lines.append(f"{name}: {section.__doc__}")
        for key, field in section.model_fields.items():
            default = _written(field.default)
            lines.append(f"  {name}.{key}  ({allowed(field)}; default {default})")
            lines.append(f"      {field.description}")
        lines.append("")
    lines.append("lists:")
    for name in LISTS:
        field = Config.model_fields[name]
        lines.append(f"  {name}  ({allowed(field)}; default {_written(field.default)})")
        lines.append(f"      {field.description}")
    lines.append("")
    return "\n".join(lines)
