"""Hooks of mkdocs: pages that are generated, and links that leave the site.

A page with a marker such as ``<!-- generated: configuration -->`` gets the generated text in its
place. GitHub shows the page without it, with a line that says where the same text is printed.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the `mkdocs` command does not add it

from docs import notebook_page, reference_pages  # noqa: E402

MARKER = re.compile(r"<!-- generated: (\w+) -->\n(.*\n)?")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
MERMAID = re.compile(r"```mermaid\n.*?```\n", re.DOTALL)

logger = logging.getLogger("mkdocs.hooks.cxr_vit")


def on_files(files: Files, config: Any) -> Files:
    """Put the executed notebook in place of its page, unless `extra.execute_notebook` is false."""
    if not config["extra"]["execute_notebook"]:
        return files
    for name, content in notebook_page.render(REPOSITORY).items():
        old = files.get_file_from_path(name)
        if old is not None:
            files.remove(old)
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in generated parts, and turn links to files outside docs/ into their text."""
    markdown = MARKER.sub(lambda match: reference_pages.PARTS[match.group(1)](), markdown)
    markdown = MERMAID.sub(
        "", markdown
    )  # drawn by a script from the network; a picture is beside it
    folder = Path(config["docs_dir"], page.file.src_uri).parent
    return LINK.sub(lambda match: _inside(match, folder, Path(config["docs_dir"])), markdown)


def _inside(match: re.Match[str], folder: Path, docs: Path) -> str:
    """Return a link as it is, or its text if it leads to a file of the repository outside docs."""
    text, target = match.groups()
    if target.startswith(("http:", "https:", "mailto:", "#")):
        return match.group()
    path = Path(os.path.normpath(folder / target.partition("#")[0]))
    return match.group() if docs in path.parents else text
