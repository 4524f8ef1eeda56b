"""Pages of one HTML file: a template of the package, with its style and its script inline.

The content security policy of a page forbids every address, and every style and script but its own,
which it knows by their hashes. All values are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

_HERE = Path(__file__).parent


def printable(text: str) -> str:
    """Escape characters that no page or terminal should get: controls, lone surrogates."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def render(template: Path, **values: Any) -> str:
    """Render a template that extends ``web_page.html``; return the page, which is XML too.

    Files of the same name with the endings css and js are its style and its script. For XML they
    have no ``<`` and no ``&``. `values` have `title` and `notice`; markup in a `str` is escaped, in
    a `Markup` it is not.
    """
    environment = Environment(
        loader=FileSystemLoader([str(template.parent), str(_HERE)]),
        autoescape=True,
        finalize=_finalized,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = _text(_HERE / "web_page.css") + _text(template.with_suffix(".css"))
    script = _text(template.with_suffix(".js"))
    policy = ["default-src 'none'", "img-src data:", f"style-src {_hash(style)}"]
    if script:
        policy.append(f"script-src {_hash(script)}")
    return environment.get_template(template.name).render(
        policy="; ".join(policy), style=Markup(style), script=Markup(script), **values
    )


def data_uri(picture: Image.Image, *, largest_side: int) -> str:
    """Return a picture as the address of an ``img`` of at most `largest_side` pixels.

    It is a PNG, or a JPEG of a picture in colours, which takes a fifth of the space.
    """
    picture = picture.copy()
    picture.thumbnail((largest_side, largest_side))
    buffer = io.BytesIO()
    kind = "jpeg" if picture.mode == "RGB" else "png"
    picture.save(buffer, format=kind, optimize=True, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _finalized(value: Any) -> Any:
    """Make a value of a template printable; `Markup` is, line breaks included."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
