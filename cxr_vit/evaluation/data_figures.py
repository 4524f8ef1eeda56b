"""Pictures of the data: who is in the splits, and films with the boxes drawn around findings.

Figures are drawn off screen; the caller closes nothing.
"""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from cxr_vit.data.annotations import FILM_PIXELS
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.splits import SPLIT_NAMES
from cxr_vit.evaluation.data_page import printable

__all__ = [
    "age_figure",
    "choose_films",
    "film_cards",
    "films_per_patient_figure",
    "prevalence_figure",
]

_FILM_COUNTS = (1, 2, 3, 5, 10, 20, 50)
_YEARS = np.arange(0, 126, 5)
#: Larger films are shrunk for the page.
_LARGEST_SIDE = 256
_WITHOUT_FINDING = 6


def prevalence_figure(percent: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw how common each finding is in each split.

    Parameters
    ----------
    percent
        Split -> float ``[C]``, percent of its films.
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
    axis.set_xlabel("% of the split's films", fontsize=9)
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
    axis.set_ylabel("% of the split's films", fontsize=9)
    axis.legend(fontsize=9)
    return figure


def films_per_patient_figure(counts: Mapping[str, np.ndarray]) -> Figure:
    """Draw how many films a patient has in each split.

    Parameters
    ----------
    counts
        Split -> int ``[patients]``, films of each, at least 1.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    edges = [*_FILM_COUNTS, np.inf]
    labels = [
        str(low) if high == low + 1 else f"{low}-{high - 1:.0f}"
        for low, high in zip(edges[:-1], edges[1:])
    ]
    labels[-1] = f"{_FILM_COUNTS[-1]}+"
    width = 0.8 / max(1, len(counts))
    for position, (split, films) in enumerate(counts.items()):
        share = 100 * np.histogram(films, bins=edges)[0] / len(films)
        places = np.arange(len(labels)) - 0.4 + width * (position + 0.5)
        axis.bar(places, share, width, label=split, color=_colour(split))
    axis.set_xticks(np.arange(len(labels)), labels=labels)
    axis.set_xlabel("films of a patient", fontsize=9)
    axis.set_ylabel("% of the split's patients", fontsize=9)
    axis.legend(fontsize=9)
    return figure


def _colour(split: str) -> str:
    return f"C{SPLIT_NAMES.index(split)}"


def choose_films(
    labels: np.ndarray,
    rows: np.ndarray,
    names: Sequence[str],
    boxes: pd.DataFrame,
    *,
    seed: int,
) -> List[int]:
    """Draw films to show: for each label one at random and one with its box, no film twice.

    Parameters
    ----------
    labels
        bool ``[N, C]``.
    rows
        int64 ``[n]``, the rows of `labels` to draw from.
    names
        The C label names, the last one No Finding: six films have none.
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


def film_cards(
    module: ChestXrayDataModule, rows: Sequence[int], findings: Mapping[int, Sequence[str]]
) -> str:
    """Write films with their boxes and what is known of them as HTML.

    Parameters
    ----------
    module
        The data.
    rows
        Rows of `module.records`, each in a split.
    findings
        Row -> the film's findings.

    Raises
    ------
    DataError
        If a film cannot be read.
    """
    pixels = _read_films(module, rows)
    table = module.records.table
    boxes = module.records.boxes
    cards = []
    for row in rows:
        split, film = pixels[row]
        record = table.iloc[row]
        years = "age unknown" if np.isnan(record["age"]) else f"{record['age']:.0f} years"
        known = [split, years, record["sex"] or "sex unknown", record["view"] or "view unknown"]
        title = ", ".join(findings[row]) or "No Finding"
        lines = [", ".join(known), record["image"]]
        drawn = list(boxes[boxes["row"] == row].itertuples())
        if drawn:
            lines.append("box: " + ", ".join(dict.fromkeys(box.finding for box in drawn)))
        cards.append(_card(film, title, lines, drawn))
    return '<div class="films">\n' + "\n".join(cards) + "\n</div>"


def _read_films(
    module: ChestXrayDataModule, rows: Sequence[int]
) -> Dict[int, Tuple[str, np.ndarray]]:
    """Read the films, a split at a time: row -> (split, uint8 [H, W])."""
    found: Dict[int, Tuple[str, np.ndarray]] = {}
    for split in SPLIT_NAMES:
        of_split = getattr(module.splits, split)
        wanted = np.intersect1d(np.array(rows, dtype=np.int64), of_split)
        if len(wanted):
            places = np.searchsorted(of_split, wanted)  # a split's rows ascend
            films = module.dataset(split).films(places)
            found.update((int(row), (split, film)) for row, film in zip(wanted, films))
    return found


def _card(film: np.ndarray, title: str, lines: Sequence[str], boxes: Sequence[Any]) -> str:
    """Draw a film; the SVG's units are those of the boxes, whatever the size of the film."""
    title, *lines = (escape(printable(text)) for text in (title, *lines))
    shapes = "".join(
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}">'
        f"<title>{escape(printable(box.finding))}</title></rect>"
        for box in boxes
    )
    return (
        f'<figure><svg viewBox="0 0 {FILM_PIXELS} {FILM_PIXELS}" role="img" aria-label="{title}">'
        f'<image width="{FILM_PIXELS}" height="{FILM_PIXELS}" href="data:image/png;base64,'
        f'{_png(film)}" />{shapes}</svg>'
        f"<figcaption><b>{title}</b><br />{'<br />'.join(lines)}</figcaption></figure>"
    )


def _png(film: np.ndarray) -> str:
    picture = Image.fromarray(film)
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
