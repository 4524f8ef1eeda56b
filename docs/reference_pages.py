"""The generated parts of the reference: the configuration's fields, the commands' help, the API."""

from __future__ import annotations

import html
import io
import json
import os
import re
from contextlib import redirect_stdout, suppress
from functools import partial
from typing import Any, Callable, Dict, List
from unittest import mock

from cxr_vit import _MODULES as MODULES
from cxr_vit.config.help import allowed
from cxr_vit.config.schema import SECTIONS, Config

#: Columns of the commands' help: what fits on a page.
WIDTH = 92


def configuration() -> str:
    """Return every section and field: what it allows, its default, its meaning."""
    lines: List[str] = []
    for name, field in Config.model_fields.items():
        if name not in SECTIONS:
            lines += [f"## {name}", "", *_table({name: field})]
            continue
        section = SECTIONS[name]
        lines += [f"## {name}", "", str(section.__doc__).strip(), ""]
        lines += _table({f"{name}.{key}": field for key, field in section.model_fields.items()})
        for first, *others in section.exclusive:
            keys = ", ".join(f"`{name}.{key}`" for key in others)
            lines += [f"Of `{name}.{first}` and {keys} only one counts.", ""]
    return "\n".join(lines)


def _table(fields: Dict[str, Any]) -> List[str]:
    rows = [
        f"| `{key}` | {_cell(allowed(field))} | `{_default(field)}` | {_cell(field.description)} |"
        for key, field in fields.items()
    ]
    return ["| key | allowed | default | meaning |", "|---|---|---|---|", *rows, ""]


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: object) -> str:
    """Return text for a cell of a table: what Markdown or HTML would interpret is escaped."""
    return re.sub(r"([\\|*_\[\]])", r"\\\1", html.escape(str(text), quote=False))


def command_line() -> str:
    """Return the help of every command, without the fields that the configuration page lists."""
    from cxr_vit import cli

    lines = ["| command | what it does |", "|---|---|"]
    for name, command in cli.COMMANDS.items():
        lines.append(f"| [`{name}`](#{name}) | {_cell(command.summary)} |")
    for name in cli.COMMANDS:
        text = _help(partial(cli.main, [name, "--help"]))
        lines += ["", f"## {name}", "", "```", text, "```"]
    return "\n".join(lines)


def _help(command: Callable[[], object]) -> str:
    printed = io.StringIO()
    plain = {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    patched, redirected = mock.patch.dict(os.environ, plain), redirect_stdout(printed)
    with patched, redirected, suppress(SystemExit):
        command()
    return printed.getvalue().partition("\nsections and fields:")[0].strip()


#: Headings of the API's page, with public names of `cxr_vit`.
API = {
    "Configuration": ["load_config", "Config"],
    "Data": ["ChestXrayDataModule", "Batch"],
    "Model": ["ViTModule"],
    "Training": ["Trainer", "Callback", "TrainOutputs", "EarlyStopping"],
    "Loggers": [
        *("Logger", "TensorBoardLogger", "JsonlLogger", "CsvLogger", "WandbLogger"),
        "MLFlowLogger",
    ],
    "Engines": ["Engine", "TorchEngine", "PipelineEngine", "PopTorchEngine"],
    "Metrics": ["evaluate", "probabilities"],
    "Errors": ["CxrVitError"],
}
#: What the hooks of a callback get, documented where they are defined.
BESIDE = {"TrainOutputs": ["evaluation.metrics.EvalOutputs"]}


def api() -> str:
    """Return mkdocstrings' instructions for every public name."""
    lines: List[str] = []
    for heading, names in API.items():
        lines += [f"## {heading}", ""]
        for name in names:
            for path in [f"{MODULES[name]}.{name}", *BESIDE.get(name, [])]:
                lines += [f"::: cxr_vit.{path}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)


#: Name in the marker -> what makes the text.
PARTS: Dict[str, Callable[[], str]] = {
    "api": api,
    "notebook": lambda: "",  # docs/notebook_page.py replaces the page
    "configuration": configuration,
    "command_line": command_line,
}
