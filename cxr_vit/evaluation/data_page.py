"""Sections of tables and notes, written as text for a terminal and as one HTML page.

The page needs nothing but itself: its style is inside, its pictures are data URIs, and its policy
forbids scripts and every address. It is well-formed XML too, so that any parser can check it.
Imports no torch.
"""

from __future__ import annotations

import base64
import io
import textwrap
from html import escape
from string import Template
from typing import List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

__all__ = ["Section", "Table", "figure_html", "html_page", "printable", "table_html", "text_report"]

#: Width of the text, characters.
TEXT_WIDTH = 110

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>$title</title>
<style>
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: #222; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ccc; }
.notice, .warning { background: #fff6dd; border-left: .3rem solid #d9a400; padding: .3rem .8rem;
  margin: .5rem 0; }
.caption { font-size: .85rem; color: #555; margin: 1rem 0 .2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #e5e5e5;
  font-weight: normal; white-space: nowrap; }
th.text, td.text { text-align: left; }
td.text:last-child { white-space: normal; }
tbody th { position: sticky; left: 0; background: #fff; }
thead th { font-weight: 600; vertical-align: bottom; }
th[colspan] { text-align: center; border-left: 1px solid #ccc; }
table.heat th, table.heat td { padding: .15rem .35rem; }
table.heat thead th + th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  vertical-align: top; padding: .35rem .15rem; }
.side-by-side { margin-top: 1rem; display: flex; flex-wrap: wrap; gap: 1rem; }
.side-by-side figure { flex: 0 1 33rem; min-width: 0; margin: 0; }
.films { margin-top: 1rem; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.films figure { margin: 0; min-width: 0; }
figure img, .films svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .8rem; line-height: 1.35; color: #555; margin-top: .3rem; }
figcaption b { color: #222; }
rect { fill: none; stroke: #ffb000; stroke-width: 8; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="notice">$notice</p>
$sections
</body>
</html>
""")


class Table(NamedTuple):
    """A table of texts.

    `header` may be empty. `groups` are headings over the columns after the text columns: each its
    text and its number of columns. The first `text_columns` columns are aligned left, the others
    are numbers. `shades`, float ``[rows, numbers]`` in 0..1, colours the page's cells.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    groups: Sequence[Tuple[str, int]] = ()
    shades: Optional[np.ndarray] = None


class Section(NamedTuple):
    """A heading, what to look out for, tables and notes; `markup` is HTML for the page alone."""

    title: str
    tables: Sequence[Table] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    markup: str = ""


def printable(text: str) -> str:
    """Write what no page and no terminal should get (controls, lone surrogates) as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def text_report(title: str, notice: str, sections: Sequence[Section]) -> str:
    """Write the sections as plain text, lines of at most 110 characters where words allow."""
    lines = [title, "=" * min(len(title), TEXT_WIDTH), *_wrapped(notice)]
    for section in sections:
        lines += ["", section.title, "-" * len(section.title)]
        for warning in section.warnings:
            lines += _wrapped(f"! {warning}", indent="  ")
        for note in section.notes:
            lines += _wrapped(note)
        for position, table in enumerate(section.tables):
            # A blank line and its caption tell a table from what stands above it.
            above = position or section.warnings or section.notes
            lines += ["", *_wrapped(table.caption)] if above else []
            lines += _text_table(table)
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(text: str, indent: str = "") -> List[str]:
    return textwrap.wrap(
        printable(text),
        TEXT_WIDTH,
        subsequent_indent=indent,
        break_long_words=False,  # a path or a hash is there to be copied
        break_on_hyphens=False,
    )


def _text_table(table: Table) -> List[str]:
    rows = [[printable(cell) for cell in row] for row in table.rows]
    cells = [list(table.header), *rows] if table.header else rows
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [_group_line(table, widths)] if table.groups else []
    for row in cells:
        aligned = [
            cell.ljust(width) if column < table.text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        if table.text_columns == len(row):  # the last text may be long
            left = "  ".join(aligned[:-1]) + "  "
            aligned = _wrapped(left + row[-1], indent=" " * len(left)) or [left]
            lines += aligned
        else:
            lines.append("  ".join(aligned))
    return lines


def _group_line(table: Table, widths: Sequence[int]) -> str:
    start = table.text_columns
    parts = [" " * width for width in widths[:start]]
    for text, count in table.groups:
        width = sum(widths[start : start + count]) + 2 * (count - 1)
        parts.append(f" {text} ".center(width, "-"))
        start += count
    return "  ".join(parts)


def html_page(title: str, notice: str, sections: Sequence[Section]) -> str:
    """Write the sections as one HTML5 page; all texts but `markup` are escaped here."""
    return _PAGE.substitute(
        title=_escaped(title),
        notice=_escaped(notice),
        sections="\n".join(_section_html(section) for section in sections),
    )


def _section_html(section: Section) -> str:
    parts = ["<section>", f"<h2>{_escaped(section.title)}</h2>"]
    parts += [f'<p class="warning">{_escaped(text)}</p>' for text in section.warnings]
    parts += [f"<p>{_escaped(text)}</p>" for text in section.notes]
    parts += [table_html(table) for table in section.tables]
    return "\n".join([*parts, section.markup, "</section>"])


def table_html(table: Table) -> str:
    """Write a table as HTML, in a box of its own that scrolls where the screen is narrow."""
    # The caption stands above the box: in the table it would be as wide as that, and scroll away.
    caption = _escaped(table.caption)
    name = ' class="heat"' if table.shades is not None else ""
    lines = [
        f'<p class="caption">{caption}</p>',
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table{name}>',
    ]
    if table.header:
        lines.append("<thead>")
        if table.groups:
            above = f'<td colspan="{table.text_columns}"></td>' + "".join(
                f'<th colspan="{count}" scope="colgroup">{_escaped(text)}</th>'
                for text, count in table.groups
            )
            lines.append(f"<tr>{above}</tr>")
        heads = "".join(
            f'<th{_text_class(table, column)} scope="col">{_escaped(text)}</th>'
            for column, text in enumerate(table.header)
        )
        lines += [f"<tr>{heads}</tr>", "</thead>"]
    lines += ["<tbody>", *(_row_html(table, row) for row in range(len(table.rows))), "</tbody>"]
    return "\n".join([*lines, "</table></div>"])


def _row_html(table: Table, row: int) -> str:
    first, *others = table.rows[row]
    cells = [f'<th class="text" scope="row">{_escaped(first)}</th>']
    for column, text in enumerate(others, start=1):
        style = ""
        if table.shades is not None:
            shade = float(table.shades[row, column - table.text_columns])
            style = f' style="background:rgba(31,119,180,{0.85 * shade:.3f})"'
        cells.append(f"<td{_text_class(table, column)}{style}>{_escaped(text)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _text_class(table: Table, column: int) -> str:
    return ' class="text"' if column < table.text_columns else ""


def figure_html(figure: Figure, caption: str) -> str:
    """Write a figure as an HTML `figure`: an SVG that no other on the page can disturb."""
    buffer = io.BytesIO()
    # A fixed salt and no date: the same data give the same page, byte by byte.
    with matplotlib.rc_context({"svg.hashsalt": "cxr_vit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = _escaped(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{source}" />'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _escaped(text: str) -> str:
    return escape(printable(text))
