"""What is counted of a data set: findings, findings together, and patients, split by split.

The images that count are those in a split; "all" is the splits together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import pandas as pd

from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.labels import NO_FINDING
from cxr_vit.data.nih import IMAGE_PIXELS, RELABELS
from cxr_vit.data.splits import SPLIT_NAMES, num_sharing_patients
from cxr_vit.dataset_report.page import (
    Section,
    Table,
    age_figure,
    choose_images,
    figure_html,
    html_page,
    image_cards,
    images_per_patient_figure,
    prevalence_figure,
    table_html,
    text_report,
)

__all__ = [
    "PARTS",
    "SplitData",
    "count_text",
    "findings_section",
    "gather",
    "pairs_section",
    "people_section",
    "percent_text",
    "write_data_report",
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
        """The splits that have images, and all."""
        return [part for part in PARTS if len(self.rows[part])]

    @property
    def splits(self) -> List[str]:
        """The splits that have images."""
        return [split for split in SPLIT_NAMES if len(self.rows[split])]

    def column(self, name: str, part: str) -> pd.Series:
        """Return a column of the table for the images of a split."""
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
    """Count the images and patients with each finding, and say what a split cannot score."""
    images = {part: data.labels[data.rows[part]].sum(axis=0) for part in PARTS}
    patients = {part: _patients_with(data, part) for part in PARTS}
    percent = {
        part: 100.0 * images[part] / max(1, len(data.rows[part])) for part in (*data.splits, "all")
    }
    rows = []
    for column, name in enumerate(data.names):
        counts = [count_text(of[part][column]) for of in (images, patients) for part in PARTS]
        shares = [f"{percent[part][column]:.1f}" if part in percent else "-" for part in PARTS]
        rows.append([name, *counts, *shares])
    table = Table(
        "Images and patients with each finding",
        ["finding", *PARTS * 3],
        rows,
        groups=[(what, len(PARTS)) for what in ("images", "patients", "% of images")],
    )
    drawn = {split: percent[split][:-1] for split in data.splits}
    caption = "How common each finding is in each split, percent of its images"
    markup = figure_html(prevalence_figure(drawn, data.names[:-1]), caption)
    return Section(
        "Findings",
        [table],
        [text for split in SPLIT_NAMES for text in _scarce(data, split, images, patients)],
        markup=f'<div class="side-by-side">{markup}</div>',
    )


def _patients_with(data: SplitData, part: str) -> np.ndarray:
    """Count the patients with each label, int64 ``[len(names)]``."""
    patients = data.column("patient", part).to_numpy()
    labels = data.labels[data.rows[part]]
    return np.array([len(np.unique(patients[column])) for column in labels.T], dtype=np.int64)


def _scarce(
    data: SplitData, split: str, images: Dict[str, np.ndarray], patients: Dict[str, np.ndarray]
) -> List[str]:
    """Say which labels a split cannot score, or hardly."""
    total = len(data.rows[split])
    if total == 0:
        return [f"{split}: no images."]
    absent, everywhere, noisy = [], [], []
    for name, found, people in zip(data.module.names, images[split], patients[split]):
        if found == 0:
            absent.append(name)
        elif found == total:
            everywhere.append(name)
        elif people < FEW_PATIENTS:
            noisy.append(f"{name} ({people})")
    undefined = "nothing to learn from" if split == "train" else "the score is undefined"
    little = "little to learn from" if split == "train" else "the score is nearly noise"
    texts = (
        (absent, f"no image with {', '.join(absent)}: {undefined}."),
        (everywhere, f"no image without {', '.join(everywhere)}: {undefined}."),
        (noisy, f"fewer than {FEW_PATIENTS} patients with {', '.join(noisy)}: {little}."),
    )
    return [f"{split}: {text}" for names, text in texts if names]


def pairs_section(data: SplitData) -> Section:
    """Count the images that have two findings: the ten most frequent pairs; on the page, all."""
    names = data.names[:-1]
    found = data.labels[data.rows["all"], :-1].astype(np.int64)
    together = found.T @ found
    images = np.diag(together)
    # Share of the row's images that have the column's finding too; the diagonal says nothing.
    shares = together / np.maximum(images, 1)[:, None]
    np.fill_diagonal(shares, 0.0)
    heat = Table(
        "Images with both findings, over all splits; on the diagonal all images with the finding."
        " The darker, the larger a part of the row's images has the column's finding too.",
        ["", *names],
        [[name, *(count_text(value) for value in together[row])] for row, name in enumerate(names)],
        shades=shares,
    )
    above = np.triu_indices(len(names), k=1)
    order = np.argsort(-together[above], kind="stable")[:10]
    pairs = [(above[0][place], above[1][place]) for place in order]
    expected = np.outer(images, images) / max(1, len(found))
    top = Table(
        "The ten most frequent pairs, over all splits",
        ["finding A", "finding B", "images", "% of A", "% of B", "times chance"],
        [
            [
                names[one],
                names[other],
                count_text(together[one, other]),
                percent_text(together[one, other], images[one]),
                percent_text(together[one, other], images[other]),
                f"{together[one, other] / expected[one, other]:.1f}",
            ]
            for one, other in pairs
            if together[one, other]
        ],
        text_columns=2,
    )
    several = int((found.sum(axis=1) > 1).sum())
    most = found.sum(axis=1).max()
    note = f"{count_text(several)} images have more than one finding, at most {most}."
    return Section("Findings together", [top], notes=[note], markup=table_html(heat))


def people_section(data: SplitData) -> Section:
    """Compare the splits by their patients: images of each, age, sex and view."""
    images_each = {
        part: np.unique(data.column("patient", part), return_counts=True)[1] for part in data.parts
    }
    ages = {part: data.column("age", part).dropna().to_numpy() for part in data.parts}
    rows: List[Tuple[str, Dict[str, str]]] = [
        ("images", {part: count_text(len(data.rows[part])) for part in PARTS}),
        ("patients", {part: count_text(len(each)) for part, each in images_each.items()}),
        ("images per patient, mean", {part: f"{x.mean():.1f}" for part, x in images_each.items()}),
        (
            "images per patient, median (most)",
            {part: f"{np.median(x):.0f} ({x.max()})" for part, x in images_each.items()},
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
        "Patients and images by split; percent of the split's images",
        ["", *PARTS],
        [[name, *(cells.get(part, "-") for part in PARTS)] for name, cells in rows],
    )
    each = {split: images_each[split] for split in data.splits}
    known = {split: ages[split] for split in data.splits if len(ages[split])}
    figures = [
        figure_html(images_per_patient_figure(each), "How many images a patient has, by split")
    ]
    if known:
        figures.insert(0, figure_html(age_figure(known), "Age by split, in steps of five years"))
    return Section(
        "Age, sex, view and images per patient",
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


NOTICE = (
    "For research only; not a medical device. Where the data are real, the page shows patients'"
    " images: keep it where the data may be kept."
)

#: A radiologists' label and the findings of NIH that mean it.
_MEANING = {
    "Pneumothorax": ("Pneumothorax",),
    "Airspace opacity": ("Consolidation", "Infiltration", "Pneumonia", "Edema"),
    "Nodule or mass": ("Nodule", "Mass"),
}


def write_data_report(module: ChestXrayDataModule, out: Path, *, seed: int = 0) -> str:
    """Write the HTML report of a data set and return its text, for the terminal.

    Parameters
    ----------
    module
        The data; images are read for the page of samples only.
    out
        The HTML file, written aside and renamed; its folder is made if it is not there.
    seed
        Seed of the draw of sample images. The same data and seed give the same page.

    Returns
    -------
    str
        The report without figures and images, lines of at most 110 characters where words allow.

    Raises
    ------
    DataError
        If a sample image cannot be read.
    OSError
        If the page cannot be written.
    """
    data = gather(module)
    title = f"Data report: {module.csv.name}"
    sections = [
        _facts(data),
        findings_section(data),
        pairs_section(data),
        people_section(data),
        _left_out(data),
    ]
    sections += [
        section for section in (_boxes(data), _relabels(data), _samples(data, seed)) if section
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.writing")
    aside.write_text(html_page(title, NOTICE, sections), encoding="utf-8")
    aside.replace(out)
    return text_report(title, NOTICE, sections)


def _facts(data: SplitData) -> Section:
    module, rows = data.module, data.rows
    prints = module.fingerprint()
    facts = [
        ("label CSV", str(module.csv)),
        ("its form", module.records.variant),
        ("its SHA-256", prints["csv_sha256"]),
        ("split", ", ".join(filter(None, (module.splits.kind, module.splits.source)))),
        ("its SHA-256", prints["split_sha256"]),
        ("images", f"{count_text(len(rows['all']))} ({_sizes(data)})"),
        ("patients", count_text(data.column("patient", "all").nunique())),
        ("labels", f"{len(module.names)} an image: {', '.join(module.names)}"),
    ]
    warnings = [
        f"{count_text(shared)} of {count_text(len(rows[split]))} {split} images share a patient with"
        f" {other}: scores on {split} are flattered."
        for split, other in (("val", "train"), ("test", "train"), ("test", "val"))
        for shared in [num_sharing_patients(module.records, rows[split], rows[other])]
        if shared
    ]
    notes = [] if warnings else ["No patient is in two splits."]
    outside = len(data.table) - len(rows["all"])
    if outside:
        notes.append(f"{count_text(outside)} images are in no split and are not counted below.")
    table = Table("What was read", (), facts, text_columns=2)
    return Section("The data", [table], warnings, notes)


def _sizes(data: SplitData) -> str:
    return ", ".join(f"{split} {count_text(len(data.rows[split]))}" for split in SPLIT_NAMES)


def _left_out(data: SplitData) -> Section:
    skipped = data.module.skipped
    if skipped.empty:
        return Section("Missing and skipped images", notes=["None."])
    counts = skipped["reason"].value_counts()
    reasons = [[count_text(count), str(reason)] for reason, count in counts.items()]
    if len(reasons) > 10:
        reasons = [*reasons[:10], [count_text(counts.iloc[10:].sum()), "for other reasons"]]
    # Rare reasons first: ten of 112,000 missing images would hide the three damaged ones.
    rarest = np.argsort(skipped["reason"].map(counts).to_numpy(), kind="stable")[:10]
    some = skipped[["image", "reason"]].iloc[rarest].astype(str).to_numpy().tolist()
    warning = f"Images of the CSV that are missing or were left out: {count_text(len(skipped))}."
    return Section(
        "Missing and skipped images",
        [
            Table("How many and why", ["images", "reason"], reasons, text_columns=2),
            Table("Ten of them, rare reasons first", ["image", "reason"], some, text_columns=2),
        ],
        [warning],
    )


def _boxes(data: SplitData) -> Optional[Section]:
    boxes = data.module.records.boxes
    if boxes.empty:
        return None
    area = 100.0 * boxes["width"] * boxes["height"] / IMAGE_PIXELS**2
    rows = []
    for name in data.names[:-1]:
        of_finding = (boxes["finding"] == name).to_numpy()
        if not of_finding.any():
            continue
        images = boxes["row"][of_finding]
        counts = [int(images.isin(data.rows[part]).sum()) for part in PARTS]
        size = f"{area[of_finding].median():.2f}"
        rows.append([name, *map(count_text, counts), size])
    note = f"{count_text(len(boxes))} boxes on {count_text(boxes['row'].nunique())} images."
    table = Table(
        "Boxes by finding and split", ["finding", *PARTS, "median area, % of image"], rows
    )
    return Section("Boxes around findings", [table], notes=[note])


def _relabels(data: SplitData) -> Optional[Section]:
    answers = data.module.records.relabels
    if np.isnan(answers).all():
        return None
    rows = []
    for column, label in enumerate(RELABELS):
        read = np.flatnonzero(~np.isnan(answers[:, column]))
        second = answers[read, column] == 1
        cells = [label, count_text(len(read)), count_text(second.sum())]
        if label not in _MEANING:
            rows.append([*cells, *["-"] * 5])
            continue
        names = [data.names.index(name) for name in _MEANING[label]]
        first = data.labels[read][:, names].any(axis=1)
        both = int((first & second).sum())
        counts = (both, int((first & ~second).sum()), int((~first & second).sum()))
        of_first, of_second = (percent_text(both, int(total.sum())) for total in (first, second))
        rows.append([*cells, *map(count_text, counts), of_first, of_second])
    header = ["label", "images read", "positive", "both", "CSV only", "readers only"]
    table = Table(
        "The CSV's labels against the radiologists' (Google, 2019)",
        [*header, "PPV, %", "sensitivity, %"],
        rows,
    )
    meanings = "; ".join(
        f"{label} as {' or '.join(names)}" for label, names in _MEANING.items() if len(names) > 1
    )
    images = int((~np.isnan(answers)).any(axis=1).sum())
    note = (
        f"{count_text(images)} images were read again. They were not drawn at random, so the rates"
        f" are not those of the whole set. The CSV has {meanings}."
    )
    return Section("Radiologists' second reading", [table], notes=[note])


def _samples(data: SplitData, seed: int) -> Section:
    boxes = data.module.records.boxes
    rows = choose_images(data.labels, data.rows["all"], data.names, boxes, seed=seed)
    findings = {
        row: [name for name, found in zip(data.names[:-1], data.labels[row]) if found]
        for row in rows
    }
    note = (
        f"The page shows {len(rows)} images drawn with seed {seed}: of each finding one, and one"
        " with its box where there are boxes, and some without a finding."
    )
    markup = image_cards(data.module, rows, findings)
    return Section("Sample images", notes=[note], markup=markup)
