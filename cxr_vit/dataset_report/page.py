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
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.nih import IMAGE_PIXELS
from cxr_vit.data.splits import SPLIT_NAMES

__all__ = [
    "Section",
    "Table",
    "age_figure",
    "choose_images",
    "figure_html",
    "html_page",
    "image_cards",
    "images_per_patient_figure",
    "prevalence_figure",
    "printable",
    "table_html",
    "text_report",
]


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
.images { margin-top: 1rem; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.images figure { margin: 0; min-width: 0; }
figure img, .images svg { display: block; width: 100%; height: auto; }
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


_IMAGE_COUNTS = (1, 2, 3, 5, 10, 20, 50)

_YEARS = np.arange(0, 126, 5)

#: Larger images are shrunk for the page.
_LARGEST_SIDE = 256

_WITHOUT_FINDING = 6


def prevalence_figure(percent: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw how common each finding is in each split.

    Parameters
    ----------
    percent
        Split -> float ``[C]``, percent of its images.
    names
        The C findings.
    """
    figure = Figure(figsize=(5.2, 6.0), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / max(1, len(percent))
    for position, (split, values) in enumerate(percent.items()):
        places = np.arange(len(names)) - 0.4 + height * (position + 0.5)
        axis.barh(places, values, height, label=split, color=_colour(split))
    axis.set_yticks(np.arange(len(names)), labels=list(names), fontsize=9)
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.set_xlabel("% of the split's images", fontsize=9)
    axis.legend(fontsize=9)
    return figure


def age_figure(ages: Mapping[str, np.ndarray]) -> Figure:
    """Draw the ages in each split, in steps of five years.

    Parameters
    ----------
    ages
        Split -> float ``[n]``, years, 0 to 125, none unknown and at least one.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for split, years in ages.items():
        counts, edges = np.histogram(years, bins=_YEARS)
        axis.stairs(100 * counts / len(years), edges, label=split, color=_colour(split), lw=1.6)
    oldest = max(float(years.max()) for years in ages.values())
    axis.set_xlim(0, _YEARS[np.searchsorted(_YEARS, oldest, side="right")])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("age, years", fontsize=9)
    axis.set_ylabel("% of the split's images", fontsize=9)
    axis.legend(fontsize=9)
    return figure


def images_per_patient_figure(counts: Mapping[str, np.ndarray]) -> Figure:
    """Draw how many images a patient has in each split.

    Parameters
    ----------
    counts
        Split -> int ``[patients]``, images of each, at least 1.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    edges = [*_IMAGE_COUNTS, np.inf]
    labels = [
        str(low) if high == low + 1 else f"{low}-{high - 1:.0f}"
        for low, high in zip(edges[:-1], edges[1:])
    ]
    labels[-1] = f"{_IMAGE_COUNTS[-1]}+"
    width = 0.8 / max(1, len(counts))
    for position, (split, images) in enumerate(counts.items()):
        share = 100 * np.histogram(images, bins=edges)[0] / len(images)
        places = np.arange(len(labels)) - 0.4 + width * (position + 0.5)
        axis.bar(places, share, width, label=split, color=_colour(split))
    axis.set_xticks(np.arange(len(labels)), labels=labels)
    axis.set_xlabel("images of a patient", fontsize=9)
    axis.set_ylabel("% of the split's patients", fontsize=9)
    axis.legend(fontsize=9)
    return figure


def _colour(split: str) -> str:
    return f"C{SPLIT_NAMES.index(split)}"


def choose_images(
    labels: np.ndarray,
    rows: np.ndarray,
    names: Sequence[str],
    boxes: pd.DataFrame,
    *,
    seed: int,
) -> List[int]:
    """Draw images to show: for each label one at random and one with its box, no image twice.

    Parameters
    ----------
    labels
        bool ``[N, C]``.
    rows
        int64 ``[n]``, the rows of `labels` to draw from.
    names
        The C label names, the last one No Finding: six images have none.
    boxes
        `Records.boxes`.
    seed
        Seed of the draw.

    Returns
    -------
    list of int
        Rows of `labels`, in the order of the names.
    """
    shuffled = np.random.default_rng(seed).permutation(rows)
    chosen: List[int] = []
    for column, name in enumerate(names):
        candidates = shuffled[labels[shuffled, column]]
        count = _WITHOUT_FINDING if column == len(names) - 1 else 1
        chosen += _not_yet(candidates, chosen)[:count]
        boxed = boxes["row"][boxes["finding"] == name].to_numpy()
        chosen += _not_yet(candidates[np.isin(candidates, boxed)], chosen)[:1]
    return chosen


def _not_yet(candidates: np.ndarray, chosen: Sequence[int]) -> List[int]:
    return [int(row) for row in candidates[~np.isin(candidates, chosen)]]


def image_cards(
    module: ChestXrayDataModule, rows: Sequence[int], findings: Mapping[int, Sequence[str]]
) -> str:
    """Write images with their boxes and what is known of them as HTML.

    Parameters
    ----------
    module
        The data.
    rows
        Rows of `module.records`, each in a split.
    findings
        Row -> the image's findings.

    Raises
    ------
    DataError
        If an image cannot be read.
    """
    pixels = _read_images(module, rows)
    table = module.records.table
    boxes = module.records.boxes
    cards = []
    for row in rows:
        split, image = pixels[row]
        record = table.iloc[row]
        years = "age unknown" if np.isnan(record["age"]) else f"{record['age']:.0f} years"
        known = [split, years, record["sex"] or "sex unknown", record["view"] or "view unknown"]
        title = ", ".join(findings[row]) or "No Finding"
        lines = [", ".join(known), record["image"]]
        drawn = list(boxes[boxes["row"] == row].itertuples())
        if drawn:
            lines.append("box: " + ", ".join(dict.fromkeys(box.finding for box in drawn)))
        cards.append(_card(image, title, lines, drawn))
    return '<div class="images">\n' + "\n".join(cards) + "\n</div>"


def _read_images(
    module: ChestXrayDataModule, rows: Sequence[int]
) -> Dict[int, Tuple[str, np.ndarray]]:
    """Read the images, a split at a time: row -> (split, uint8 [H, W])."""
    found: Dict[int, Tuple[str, np.ndarray]] = {}
    for split in SPLIT_NAMES:
        of_split = getattr(module.splits, split)
        wanted = np.intersect1d(np.array(rows, dtype=np.int64), of_split)
        if len(wanted):
            places = np.searchsorted(of_split, wanted)  # a split's rows ascend
            images = module.dataset(split).images(places)
            found.update((int(row), (split, image)) for row, image in zip(wanted, images))
    return found


def _card(image: np.ndarray, title: str, lines: Sequence[str], boxes: Sequence[Any]) -> str:
    """Draw an image; the SVG's units are those of the boxes, whatever the size of the image."""
    title, *lines = (escape(printable(text)) for text in (title, *lines))
    shapes = "".join(
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}">'
        f"<title>{escape(printable(box.finding))}</title></rect>"
        for box in boxes
    )
    return (
        f'<figure><svg viewBox="0 0 {IMAGE_PIXELS} {IMAGE_PIXELS}" role="img" aria-label="{title}">'
        f'<image width="{IMAGE_PIXELS}" height="{IMAGE_PIXELS}" href="data:image/png;base64,'
        f'{_png(image)}" />{shapes}</svg>'
        f"<figcaption><b>{title}</b><br />{'<br />'.join(lines)}</figcaption></figure>"
    )


def _png(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
