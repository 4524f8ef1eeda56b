"""What is counted of a data set: findings, findings together, and patients, split by split.

The films that count are those in a split; "all" is the splits together.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Tuple

import numpy as np
import pandas as pd

from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.labels import NO_FINDING
from cxr_vit.data.splits import SPLIT_NAMES
from cxr_vit.evaluation.data_figures import (
    age_figure,
    films_per_patient_figure,
    prevalence_figure,
)
from cxr_vit.evaluation.data_page import Section, Table, figure_html, table_html

__all__ = [
    "PARTS",
    "SplitData",
    "count_text",
    "findings_section",
    "gather",
    "pairs_section",
    "people_section",
    "percent_text",
]

PARTS: Tuple[str, ...] = (*SPLIT_NAMES, "all")
#: A finding of fewer patients in a split has a score that is nearly noise.
FEW_PATIENTS = 10
_ADULT_YEARS = 18


class SplitData(NamedTuple):
    """What the sections read.

    `names` are the findings and No Finding, `labels` bool ``[N, len(names)]``; `rows` gives the
    rows of each split and of all; `parts` are the names of those that have any.
    """

    module: ChestXrayDataModule
    table: pd.DataFrame
    names: List[str]
    labels: np.ndarray
    rows: Dict[str, np.ndarray]

    @property
    def parts(self) -> List[str]:
        """The splits that have films, and all."""
        return [part for part in PARTS if len(self.rows[part])]

    @property
    def splits(self) -> List[str]:
        """The splits that have films."""
        return [split for split in SPLIT_NAMES if len(self.rows[split])]

    def column(self, name: str, part: str) -> pd.Series:
        """Return a column of the table for the films of a split."""
        return self.table[name].iloc[self.rows[part]]


def gather(module: ChestXrayDataModule) -> SplitData:
    """Return what the sections read of a data set; No Finding need not be one of its labels."""
    findings = [name for name in module.names if name != NO_FINDING]
    columns = [module.names.index(name) for name in findings]
    positive = module.records.labels[:, columns].astype(bool)
    rows = {split: getattr(module.splits, split) for split in SPLIT_NAMES}
    rows["all"] = np.sort(np.concatenate(list(rows.values())))
    return SplitData(
        module,
        module.records.table,
        [*findings, NO_FINDING],
        np.column_stack([positive, ~positive.any(axis=1)]),
        rows,
    )


def findings_section(data: SplitData) -> Section:
    """Count the films and patients with each finding, and say what a split cannot score."""
    films = {part: data.labels[data.rows[part]].sum(axis=0) for part in PARTS}
    patients = {part: _patients_with(data, part) for part in PARTS}
    percent = {
        part: 100.0 * films[part] / max(1, len(data.rows[part])) for part in (*data.splits, "all")
    }
    rows = []
    for column, name in enumerate(data.names):
        counts = [count_text(of[part][column]) for of in (films, patients) for part in PARTS]
        shares = [f"{percent[part][column]:.1f}" if part in percent else "-" for part in PARTS]
        rows.append([name, *counts, *shares])
    table = Table(
        "Films and patients with each finding",
        ["finding", *PARTS * 3],
        rows,
        groups=[(what, len(PARTS)) for what in ("films", "patients", "% of films")],
    )
    drawn = {split: percent[split][:-1] for split in data.splits}
    caption = "How common each finding is in each split, percent of its films"
    markup = figure_html(prevalence_figure(drawn, data.names[:-1]), caption)
    return Section(
        "Findings",
        [table],
        [text for split in SPLIT_NAMES for text in _scarce(data, split, films, patients)],
        markup=f'<div class="side-by-side">{markup}</div>',
    )


def _patients_with(data: SplitData, part: str) -> np.ndarray:
    """Count the patients with each label, int64 ``[len(names)]``."""
    patients = data.column("patient", part).to_numpy()
    labels = data.labels[data.rows[part]]
    return np.array([len(np.unique(patients[column])) for column in labels.T], dtype=np.int64)


def _scarce(
    data: SplitData, split: str, films: Dict[str, np.ndarray], patients: Dict[str, np.ndarray]
) -> List[str]:
    """Say which labels a split cannot score, or hardly."""
    total = len(data.rows[split])
    if total == 0:
        return [f"{split}: no films."]
    absent, everywhere, noisy = [], [], []
    for name, found, people in zip(data.module.names, films[split], patients[split]):
        if found == 0:
            absent.append(name)
        elif found == total:
            everywhere.append(name)
        elif people < FEW_PATIENTS:
            noisy.append(f"{name} ({people})")
    undefined = "nothing to learn from" if split == "train" else "the score is undefined"
    little = "little to learn from" if split == "train" else "the score is nearly noise"
    texts = (
        (absent, f"no film with {', '.join(absent)}: {undefined}."),
        (everywhere, f"no film without {', '.join(everywhere)}: {undefined}."),
        (noisy, f"fewer than {FEW_PATIENTS} patients with {', '.join(noisy)}: {little}."),
    )
    return [f"{split}: {text}" for names, text in texts if names]


def pairs_section(data: SplitData) -> Section:
    """Count the films that have two findings: the ten most frequent pairs; on the page, all."""
    names = data.names[:-1]
    found = data.labels[data.rows["all"], :-1].astype(np.int64)
    together = found.T @ found
    films = np.diag(together)
    # Share of the row's films that have the column's finding too; the diagonal says nothing.
    shares = together / np.maximum(films, 1)[:, None]
    np.fill_diagonal(shares, 0.0)
    heat = Table(
        "Films with both findings, over all splits; on the diagonal all films with the finding."
        " The darker, the larger a part of the row's films has the column's finding too.",
        ["", *names],
        [[name, *(count_text(value) for value in together[row])] for row, name in enumerate(names)],
        shades=shares,
    )
    above = np.triu_indices(len(names), k=1)
    order = np.argsort(-together[above], kind="stable")[:10]
    pairs = [(above[0][place], above[1][place]) for place in order]
    expected = np.outer(films, films) / max(1, len(found))
    top = Table(
        "The ten most frequent pairs, over all splits",
        ["finding A", "finding B", "films", "% of A", "% of B", "times chance"],
        [
            [
                names[one],
                names[other],
                count_text(together[one, other]),
                percent_text(together[one, other], films[one]),
                percent_text(together[one, other], films[other]),
                f"{together[one, other] / expected[one, other]:.1f}",
            ]
            for one, other in pairs
            if together[one, other]
        ],
        text_columns=2,
    )
    several = int((found.sum(axis=1) > 1).sum())
    most = found.sum(axis=1).max()
    note = f"{count_text(several)} films have more than one finding, at most {most}."
    return Section("Findings together", [top], notes=[note], markup=table_html(heat))


def people_section(data: SplitData) -> Section:
    """Compare the splits by their patients: films of each, age, sex and view."""
    films_each = {
        part: np.unique(data.column("patient", part), return_counts=True)[1] for part in data.parts
    }
    ages = {part: data.column("age", part).dropna().to_numpy() for part in data.parts}
    rows: List[Tuple[str, Dict[str, str]]] = [
        ("films", {part: count_text(len(data.rows[part])) for part in PARTS}),
        ("patients", {part: count_text(len(each)) for part, each in films_each.items()}),
        ("films per patient, mean", {part: f"{x.mean():.1f}" for part, x in films_each.items()}),
        (
            "films per patient, median (most)",
            {part: f"{np.median(x):.0f} ({x.max()})" for part, x in films_each.items()},
        ),
        (
            "age, median (range), years",
            {
                part: f"{np.median(years):.0f} ({years.min():.0f}-{years.max():.0f})"
                for part, years in ages.items()
                if len(years)
            },
        ),
        (
            f"under {_ADULT_YEARS} years",
            {part: _share((x < _ADULT_YEARS).sum(), data, part) for part, x in ages.items()},
        ),
        (
            "age unknown",
            {part: _share(len(data.rows[part]) - len(x), data, part) for part, x in ages.items()},
        ),
        *_values(data, "sex"),
        *_values(data, "view"),
    ]
    table = Table(
        "Patients and films by split; percent of the split's films",
        ["", *PARTS],
        [[name, *(cells.get(part, "-") for part in PARTS)] for name, cells in rows],
    )
    each = {split: films_each[split] for split in data.splits}
    known = {split: ages[split] for split in data.splits if len(ages[split])}
    figures = [
        figure_html(films_per_patient_figure(each), "How many films a patient has, by split")
    ]
    if known:
        figures.insert(0, figure_html(age_figure(known), "Age by split, in steps of five years"))
    return Section(
        "Age, sex, view and films per patient",
        [table],
        markup=f'<div class="side-by-side">{"".join(figures)}</div>',
    )


def _values(data: SplitData, name: str) -> List[Tuple[str, Dict[str, str]]]:
    """Count the five most frequent texts of a column, the others, and the unknown."""
    counts = {part: data.column(name, part).value_counts() for part in data.parts}
    frequent = sorted([text for text in counts["all"].index if text][:5])
    rows = []
    for text in [*frequent, ""]:
        cells = {part: _share(of.get(text, 0), data, part) for part, of in counts.items()}
        rows.append((f"{name} {text or 'unknown'}", cells))
    others = {part: of.drop([*frequent, ""], errors="ignore").sum() for part, of in counts.items()}
    if others["all"]:
        cells = {part: _share(count, data, part) for part, count in others.items()}
        rows.insert(-1, (f"{name} of another kind", cells))
    return rows


def count_text(value: int) -> str:
    """Write a count: ``"112,120"``."""
    return f"{int(value):,}"


def percent_text(part: int, whole: int) -> str:
    """Write a share in percent, ``"53.8"``; ``"-"`` of nothing."""
    return f"{100.0 * part / whole:.1f}" if whole else "-"


def _share(count: int, data: SplitData, part: str) -> str:
    return f"{count_text(count)} ({percent_text(int(count), len(data.rows[part]))} %)"
