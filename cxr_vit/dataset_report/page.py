"""Render sections of tables, notes and figures as text for a terminal and as one HTML page.

The page is self-contained: its style is inline, its images are data URIs, and its content security
policy (`cxr_vit.web_page`) forbids scripts and addresses. It is also well-formed XML.
"""

from __future__ import annotations

import base64
import io
import textwrap
from html import escape
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cxr_vit.console import columns
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.nih import IMAGE_PIXELS
from cxr_vit.data.splits import SPLIT_NAMES
from cxr_vit.web_page import data_uri, printable, render

_TEXT_WIDTH = 110

#: Bins of the figures: images per patient (the last has no upper edge), and ages in years.
_IMAGE_COUNTS = (1, 2, 3, 5, 10, 20, 50)
_YEARS = np.arange(0, 126, 5)

_LARGEST_SIDE = 256  # larger images are shrunk
_SHADES = 20  # of cells, in page.css
_WITHOUT_FINDING = 6  # images


class Table(NamedTuple):
    """A table of texts: `text_columns` columns aligned left, then numbers."""

    caption: str
    header: Sequence[str]  # may be empty
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    groups: Sequence[Tuple[str, int]] = ()  # headings over columns of numbers, with their number
    shades: Optional[np.ndarray] = None  # float [rows, number columns] in 0..1, of the page's cells


class Section(NamedTuple):
    """A heading with tables, warnings, notes and, on the page only, figures with captions."""

    title: str
    tables: Sequence[Table] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    figures: Sequence[Tuple[Figure, str]] = ()
    markup: str = ""  # HTML, for the page only


def text_report(title: str, notice: str, sections: Sequence[Section]) -> str:
    """Render plain text, in lines of at most 110 characters where words allow."""
    lines = [title, "=" * min(len(title), _TEXT_WIDTH), *_wrapped(notice)]
    for section in sections:
        lines += ["", section.title, "-" * len(section.title)]
        for warning in section.warnings:
            lines += _wrapped(f"! {warning}", indent="  ")
        for note in section.notes:
            lines += _wrapped(note)
        for position, table in enumerate(section.tables):
            # The first table of a section needs no caption if nothing is above it.
            if position or section.warnings or section.notes:
                lines += ["", *_wrapped(table.caption)]
            lines += _text_table(table)
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(text: str, indent: str = "") -> List[str]:
    return textwrap.wrap(
        printable(text),
        _TEXT_WIDTH,
        subsequent_indent=indent,
        break_long_words=False,  # paths and hashes stay whole
        break_on_hyphens=False,
    )


def _text_table(table: Table) -> List[str]:
    rows = [table.header, *table.rows] if table.header else table.rows
    cells = [[printable(cell) for cell in row] for row in rows]
    start = table.text_columns
    if start == len(cells[0]):  # the last column is text and may be long
        beginnings = columns([row[:-1] for row in cells], left=start)
        width = max(map(len, beginnings)) + 2
        lines = []
        for beginning, row in zip(beginnings, cells):
            lines += _wrapped(beginning.ljust(width) + row[-1], indent=" " * width) or [beginning]
        return lines
    lines = columns(cells, left=start)
    if table.groups:
        widths = [max(map(len, column)) for column in zip(*cells)]
        parts = [" " * width for width in widths[:start]]
        for text, count in table.groups:
            width = sum(widths[start : start + count]) + 2 * (count - 1)
            parts.append(f" {text} ".center(width, "-"))
            start += count
        lines.insert(0, "  ".join(parts))
    return lines


def html_page(title: str, notice: str, sections: Sequence[Section]) -> str:
    """Render an HTML5 page; all texts except `markup` are escaped here."""
    template = Path(__file__).with_name("page.html")
    shown = [Markup(_section_html(section)) for section in sections]
    return render(template, title=title, notice=notice, sections=shown)


def _section_html(section: Section) -> str:
    parts = ["<section>", f"<h2>{_escaped(section.title)}</h2>"]
    parts += [f'<p class="warning">{_escaped(text)}</p>' for text in section.warnings]
    parts += [f"<p>{_escaped(text)}</p>" for text in section.notes]
    parts += [table_html(table) for table in section.tables]
    if section.figures:
        figures = "".join(_figure_html(figure, caption) for figure, caption in section.figures)
        parts.append(f'<div class="side-by-side">{figures}</div>')
    return "\n".join([*parts, section.markup, "</section>"])


def table_html(table: Table) -> str:
    """Render a table in a box that scrolls on a narrow screen."""
    # The caption is above the box; inside the table it would scroll with it.
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
        name = _text_class(table, column)
        if table.shades is not None:
            # The policy of the page allows no style but that of its style sheet.
            shade = _SHADES * float(table.shades[row, column - table.text_columns])
            name = f' class="shade-{shade:.0f}"'
        cells.append(f"<td{name}>{_escaped(text)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _text_class(table: Table, column: int) -> str:
    return ' class="text"' if column < table.text_columns else ""


def _figure_html(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    # With a fixed salt and without a date, the same data make the same page, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "cxr_vit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = _escaped(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{_base64(buffer)}" />'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _base64(buffer: io.BytesIO) -> str:
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _escaped(text: str) -> str:
    return escape(printable(text))


def prevalence_figure(percent: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw the prevalence of the C findings by split, float ``[C]`` in percent of its images."""
    figure, axis = _figure(6.0, "% of the split's images")
    _draw_bars(axis.barh, percent)
    axis.set_yticks(np.arange(len(names)), labels=list(names), fontsize=9, parse_math=False)
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.legend(fontsize=9)
    return figure


def age_figure(ages: Mapping[str, np.ndarray]) -> Figure:
    """Draw the known ages by split, float ``[n]`` in years, 0 to 125, at least one per split."""
    figure, axis = _figure(3.6, "age, years", "% of the split's images")
    for split, years in ages.items():
        counts, edges = np.histogram(years, bins=_YEARS)
        axis.stairs(100 * counts / len(years), edges, label=split, color=_colour(split), lw=1.6)
    oldest = max(float(years.max()) for years in ages.values())
    axis.set_xlim(0, _YEARS[np.searchsorted(_YEARS, oldest, side="right")])
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=9)
    return figure


def images_per_patient_figure(counts: Mapping[str, np.ndarray]) -> Figure:
    """Draw the number of images of each patient by split, int ``[patients]``, at least 1."""
    figure, axis = _figure(3.6, "images per patient", "% of the split's patients")
    edges = [*_IMAGE_COUNTS, np.inf]
    _draw_bars(
        axis.bar,
        {name: 100 * np.histogram(x, bins=edges)[0] / len(x) for name, x in counts.items()},
    )
    labels = [
        str(low) if high == low + 1 else f"{low}-{high - 1}"
        for low, high in zip(_IMAGE_COUNTS, _IMAGE_COUNTS[1:])
    ]
    labels.append(f"{_IMAGE_COUNTS[-1]}+")
    axis.set_xticks(np.arange(len(labels)), labels=labels)
    axis.legend(fontsize=9)
    return figure


def _figure(height: float, x_label: str, y_label: str = "") -> Tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, height), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(y_label, fontsize=9)
    return figure, axis


def _draw_bars(draw: Callable[..., Any], percent: Mapping[str, np.ndarray]) -> None:
    """Draw one bar per value and split, those of the same value beside each other."""
    width = 0.8 / max(1, len(percent))
    for position, (split, values) in enumerate(percent.items()):
        places = np.arange(len(values)) - 0.4 + width * (position + 0.5)
        draw(places, values, width, label=split, color=_colour(split))


def _colour(split: str) -> str:
    return f"C{SPLIT_NAMES.index(split)}"


def choose_images(
    labels: np.ndarray, rows: np.ndarray, names: Sequence[str], boxes: pd.DataFrame, *, seed: int
) -> List[int]:
    """Choose images at random: for each label one, and one with its box; no image twice.

    `labels` is bool ``[N, C]``, `rows` are the rows to choose from, `names` are the labels; of the
    last, that there is no finding, six images are chosen. Returns rows of `labels`, in the order of
    the names.
    """
    shuffled = np.random.default_rng(seed).permutation(rows)
    chosen: List[int] = []
    for column, name in enumerate(names):
        candidates = shuffled[labels[shuffled, column]]
        count = _WITHOUT_FINDING if column == len(names) - 1 else 1
        chosen += _without(candidates, chosen)[:count]
        boxed = boxes["row"][boxes["finding"] == name].to_numpy()
        chosen += _without(candidates[np.isin(candidates, boxed)], chosen)[:1]
    return chosen


def _without(candidates: np.ndarray, chosen: Sequence[int]) -> List[int]:
    return [int(row) for row in candidates[~np.isin(candidates, chosen)]]


def image_cards(
    module: ChestXrayDataModule, rows: Sequence[int], findings: Mapping[int, Sequence[str]]
) -> str:
    """Render rows of `module.records` as HTML: the image, its boxes, its findings and facts.

    Each row is in a split. Raises DataError if an image cannot be read.
    """
    pixels = _read_images(module, rows)
    boxes = module.records.boxes
    cards = []
    for row in rows:
        split, image = pixels[row]
        record = module.records.table.iloc[row]
        years = "age unknown" if np.isnan(record["age"]) else f"{record['age']:.0f} years"
        facts = [split, years, record["sex"] or "sex unknown", record["view"] or "view unknown"]
        lines = [", ".join(facts), record["image"]]
        drawn = list(boxes[boxes["row"] == row].itertuples())
        if drawn:
            lines.append("box: " + ", ".join(dict.fromkeys(box.finding for box in drawn)))
        title = ", ".join(findings[row]) or module.records.without_finding
        cards.append(_card(image, title, lines, drawn))
    return '<div class="images">\n' + "\n".join(cards) + "\n</div>"


def _read_images(
    module: ChestXrayDataModule, rows: Sequence[int]
) -> Dict[int, Tuple[str, np.ndarray]]:
    """Read the images of each split at once: row -> (split, uint8 ``[H, W]``)."""
    found: Dict[int, Tuple[str, np.ndarray]] = {}
    for split in SPLIT_NAMES:
        of_split = getattr(module.splits, split)
        wanted = np.intersect1d(np.array(rows, dtype=np.int64), of_split)
        if len(wanted):
            positions = np.searchsorted(of_split, wanted)  # the rows of a split ascend
            images = module.dataset(split).read_images(positions)
            found.update((int(row), (split, image)) for row, image in zip(wanted, images))
    return found


def _card(image: np.ndarray, title: str, lines: Sequence[str], boxes: Sequence[Any]) -> str:
    """Render an image; the SVG uses the units of the boxes, whatever the size of the image."""
    title, *lines = (_escaped(text) for text in (title, *lines))
    shapes = "".join(
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}">'
        f"<title>{_escaped(box.finding)}</title></rect>"
        for box in boxes
    )
    return (
        f'<figure><svg viewBox="0 0 {IMAGE_PIXELS} {IMAGE_PIXELS}" role="img" aria-label="{title}">'
        f'<image width="{IMAGE_PIXELS}" height="{IMAGE_PIXELS}" href="'
        f'{data_uri(Image.fromarray(image), largest_side=_LARGEST_SIDE)}" />{shapes}</svg>'
        f"<figcaption><b>{title}</b><br />{'<br />'.join(lines)}</figcaption></figure>"
    )
