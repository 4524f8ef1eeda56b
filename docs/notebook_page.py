"""The notebook as a page of the site, executed.

The committed notebook has no outputs. It is executed once (about three minutes) and its page kept
under ``.cache/`` until the notebook or the package changes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Dict, Union

NOTEBOOK = Path("notebooks", "chest_xray_walkthrough.ipynb")
PAGE = "tutorials/notebook.md"
CACHE = Path(".cache", "docs")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")

logger = logging.getLogger("mkdocs.hooks.cxr_vit")


def render(repository: Path) -> Dict[str, Union[str, bytes]]:
    """Return the files of the page by their path in docs/."""
    notebook = repository / NOTEBOOK
    cache = repository / CACHE / _fingerprint(repository, notebook)
    if not (cache / PAGE).is_file():
        _execute(repository, notebook, cache)
    found = {path.relative_to(cache).as_posix(): path for path in cache.rglob("*.*")}
    return {
        name: path.read_text(encoding="utf-8") if name == PAGE else path.read_bytes()
        for name, path in found.items()
    }


def _fingerprint(repository: Path, notebook: Path) -> str:
    """Return a hash of the notebook, the package and the configurations."""
    digest = hashlib.sha256()
    sources = [*repository.glob("cxr_vit/**/*.py"), *repository.glob("configs/**/*.yaml")]
    for path in (notebook, Path(__file__), *sorted(sources)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _execute(repository: Path, notebook: Path, out: Path) -> None:
    """Execute a notebook in a folder of its own; write its page and figures to `out`."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    logger.info("executing %s (about three minutes)", notebook.name)
    content = nbformat.read(notebook, as_version=4)
    search_path = os.pathsep.join([str(repository), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(content, timeout=900, resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, "PYTHONPATH": search_path})
    text, resources = MarkdownExporter().from_notebook_node(content)
    page = out / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, data in resources["outputs"].items():
        (page.parent / name).write_bytes(data)
    page.write_text(_ESCAPES.sub("", text), encoding="utf-8")
