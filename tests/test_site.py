"""The site builds without warnings and loads nothing from the network; its reference is full."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import List, Tuple

import pytest

from pages import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

import cxr_vit
from cxr_vit.cli import COMMANDS
from cxr_vit.config.schema import Config
from docs import reference_pages

#: What a browser loads by itself: element -> attributes.
LOADED = {
    "link": ["href"],
    "script": ["src"],
    "img": ["src", "srcset"],
    "source": ["src", "srcset"],
    "iframe": ["src"],
    "video": ["src", "poster"],
    "object": ["data"],
    "use": ["href"],
}


class Loads(HTMLParser):
    """Collects what a page loads from another place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: List[str] = []

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, str]]) -> None:
        values = dict(attrs)
        if values.get("rel") in ("canonical", "prev", "next"):  # not loaded
            return
        for name in LOADED.get(tag, []):
            value = values.get(name) or ""
            if re.match(r"(https?:)?//", value):
                self.found.append(f"<{tag} {name}={value}>")
        # Material fetches Mermaid, and facts about a repository, for these.
        if "mermaid" in (values.get("class") or "").split():
            self.found.append("a Mermaid diagram")
        if values.get("data-md-component") == "source":
            self.found.append("a repository's facts")


def loads(html: str) -> List[str]:
    parser = Loads()
    parser.feed(html)
    return parser.found + re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+", html)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, without executing the notebook, which another test does."""
    folder = tmp_path_factory.mktemp("site")
    text = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {ROOT / 'docs'}\n"
    text += f"site_dir: {folder / 'site'}\nextra: {{execute_notebook: false}}\n"
    text += f"hooks: [{ROOT / 'docs' / 'hooks.py'}]\n"
    (folder / "mkdocs.yml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(folder / "mkdocs.yml")],
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return folder / "site"


def pages(site: Path) -> List[Path]:
    return sorted(site.rglob("*.html"))


def test_site_loads_nothing_from_the_network(site):
    assert len(pages(site)) > 20
    found = {
        path.relative_to(site).as_posix(): loads(path.read_text(encoding="utf-8"))
        for path in [*pages(site), *site.rglob("*.css")]
    }
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://unpkg.com/mermaid/dist/mermaid.min.js"></script>',
        '<link rel="stylesheet" href="//fonts.googleapis.com/css?family=Roboto">',
        "<style>body { background: url(http://example.org/a.png) }</style>",
        '<pre class="mermaid"><code>graph TD</code></pre>',
    ],
)
def test_a_load_from_the_network_is_found(html):
    assert loads(html) != []


def test_a_link_is_not_a_load():
    assert loads('<a href="https://example.org">there</a><img src="a.png">') == []


def test_every_field_is_in_the_reference(site):
    html = (site / "reference" / "config.html").read_text(encoding="utf-8")
    keys = [
        f"{name}.{key}" if hasattr(field.annotation, "model_fields") else name
        for name, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", [name])
    ]
    assert len(keys) > 80
    assert [key for key in keys if f"<code>{key}</code>" not in html] == []
    assert "&lt;root&gt;/&lt;name&gt;-&lt;time&gt;" in html  # shown, not read as HTML


def test_every_command_is_in_the_reference(site):
    html = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f'<h2 id="{name}">' not in html] == []
    assert "--compile-only" in html
    assert "sections and fields" not in html


def test_every_public_name_is_in_the_reference(site):
    html = (site / "reference" / "api.html").read_text(encoding="utf-8")
    names = {name for names in reference_pages.API.values() for name in names}
    assert names == set(cxr_vit._MODULES)
    headings = set(re.findall(r'<h3 id="cxr_vit\.[\w.]*\.(\w+)"', html))
    assert names <= headings


def test_pages_do_not_link_to_files_that_are_not_in_the_site(site):
    missing = [
        f"{page.relative_to(site)}: {link}"
        for page in pages(site)
        for link in re.findall(r'<a [^>]*href="([^"#:]+)', page.read_text(encoding="utf-8"))
        if page.name != "404.html" and not (page.parent / link).exists()
    ]
    assert missing == []
