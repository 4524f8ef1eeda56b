"""Count findings, pairs of findings and patients by split, and write the report of a data set.

Only images in a split are counted; "all" is the splits together.
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
    ReportSection,
    ReportTable,
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
from cxr_vit.files import write_text

__all__ = ["write_data_report"]

NOTICE = (
    "For research only; not a medical device. With real data, the page shows patients' images:"
    " store it only where the data may be stored."
)

_PARTS: Tuple[str, ...] = (*SPLIT_NAMES, "all")

#: The score of a finding with fewer patients in a split is mostly noise.
_FEW_PATIENTS = 10

_ADULT_YEARS = 18

#: A radiologists' label, and the corresponding findings of the CSV.
_MEANING = {
    "Pneumothorax": ("Pneumothorax",),
    "Airspace opacity": ("Consolidation", "Infiltration", "Pneumonia", "Edema"),
    "Nodule or mass": ("Nodule", "Mass"),
}


class _SplitData(NamedTuple):
    """A data set as the sections read it; No Finding is always one of its labels."""

    module: ChestXrayDataModule
    table: pd.DataFrame
    names: List[str]  # the findings and No Finding
    labels: np.ndarray  # bool [N, len(names)]
    rows: Dict[str, np.ndarray]  # of each split and of all

    @property
    def parts(self) -> List[str]:
        """The splits that have images, and all."""
        return [part for part in _PARTS if len(self.rows[part])]

    @property
    def splits(self) -> List[str]:
        """The splits that have images."""
        return [split for split in SPLIT_NAMES if len(self.rows[split])]

    def column(self, name: str, part: str) -> pd.Series:
        """Return a column of the table for the images of a split."""
        return self.table[name].iloc[self.rows[part]]


def write_data_report(module: ChestXrayDataModule, out: Path, *, seed: int = 0) -> str:
    """Write the HTML report of a data set and return its text, for the terminal.

    Parameters
    ----------
    module
        The data; only sample images are read.
    out
        The HTML file; missing folders are made.
    seed
        Seed of the sample. The same data and seed make the same page.

    Returns
    -------
    str
        The report without figures and images, in lines of at most 110 characters where words allow.

    Raises
    ------
    DataError
        If a sample image cannot be read.
    OSError
        If the page cannot be written.
    """
    data = _gather(module)
    title = f"Data report: {module.csv.name}"
    sections = [
        _facts_section(data),
        _findings_section(data),
        _pairs_section(data),
        _patients_section(data),
        _skipped_section(data),
        _boxes_section(data),
        _relabels_section(data),
        _samples_section(data, seed),
    ]
    filled = [section for section in sections if section is not None]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html_page(title, NOTICE, filled))
    return text_report(title, NOTICE, filled)


def _gather(module: ChestXrayDataModule) -> _SplitData:
    findings = [name for name in module.names if name != NO_FINDING]
    columns = [module.names.index(name) for name in findings]
    positive = module.records.labels[:, columns].astype(bool)
    labels = np.column_stack([positive, ~positive.any(axis=1)])
    rows = {split: getattr(module.splits, split) for split in SPLIT_NAMES}
    rows["all"] = np.sort(np.concatenate(list(rows.values())))
    return _SplitData(module, module.records.table, [*findings, NO_FINDING], labels, rows)


def _facts_section(data: _SplitData) -> ReportSection:
    module, rows = data.module, data.rows
    hashes = module.fingerprint()
    sizes = ", ".join(f"{split} {_count(len(rows[split]))}" for split in SPLIT_NAMES)
    facts = [
        ("label CSV", str(module.csv)),
        ("CSV format", module.records.variant),
        ("CSV SHA-256", hashes["csv_sha256"]),
        ("split", ", ".join(filter(None, (module.splits.kind, module.splits.source)))),
        ("split SHA-256", hashes["split_sha256"]),
        ("images", f"{_count(len(rows['all']))} ({sizes})"),
        ("patients", _count(data.column("patient", "all").nunique())),
        ("labels", f"{len(module.names)} per image: {', '.join(module.names)}"),
    ]
    warnings = [
        f"{_count(shared)} of {_count(len(rows[split]))} {split} images share a patient with"
        f" {other}: scores on {split} are too optimistic."
        for split, other in (("val", "train"), ("test", "train"), ("test", "val"))
        for shared in [num_sharing_patients(module.records, rows[split], rows[other])]
        if shared
    ]
    notes = [] if warnings else ["No patient is in two splits."]
    outside = len(data.table) - len(rows["all"])
    if outside:
        notes.append(f"{_count(outside)} images are in no split and are not counted below.")
    table = ReportTable("Files and sizes", (), facts, text_columns=2)
    return ReportSection("Data set", [table], warnings, notes)


def _findings_section(data: _SplitData) -> ReportSection:
    """Count the images and patients with each finding; warn of findings that cannot be scored."""
    images = {part: data.labels[data.rows[part]].sum(axis=0) for part in _PARTS}
    patients = {part: _patients_with(data, part) for part in _PARTS}
    percent = {part: 100.0 * images[part] / len(data.rows[part]) for part in data.parts}
    rows = []
    for column, name in enumerate(data.names):
        counts = [_count(of[part][column]) for of in (images, patients) for part in _PARTS]
        shares = [f"{percent[part][column]:.1f}" if part in percent else "-" for part in _PARTS]
        rows.append([name, *counts, *shares])
    table = ReportTable(
        "Images and patients with each finding",
        ["finding", *_PARTS * 3],
        rows,
        groups=[(what, len(_PARTS)) for what in ("images", "patients", "% of images")],
    )
    warnings = [
        f"{split}: {text}"
        for split in SPLIT_NAMES
        for text in _scarce(data, split, images[split], patients[split])
    ]
    drawn = {split: percent[split][:-1] for split in data.splits}
    caption = "Prevalence of each finding by split, percent of the split's images"
    figure = figure_html(prevalence_figure(drawn, data.names[:-1]), caption)
    return ReportSection("Findings", [table], warnings, markup=_side_by_side(figure))


def _patients_with(data: _SplitData, part: str) -> np.ndarray:
    """Count the patients with each label, int64 ``[len(names)]``."""
    patients = data.column("patient", part).to_numpy()
    labels = data.labels[data.rows[part]]
    return np.array([len(np.unique(patients[column])) for column in labels.T], dtype=np.int64)


def _scarce(data: _SplitData, split: str, images: np.ndarray, patients: np.ndarray) -> List[str]:
    """Describe the labels that a split cannot score, or only with noise."""
    total = len(data.rows[split])
    if total == 0:
        return ["no images."]
    absent, everywhere, noisy = [], [], []
    for name, found, people in zip(data.module.names, images, patients):
        if found == 0:
            absent.append(name)
        elif found == total:
            everywhere.append(name)
        elif people < _FEW_PATIENTS:
            noisy.append(f"{name} ({people})")
    undefined = "nothing to learn from" if split == "train" else "the score is undefined"
    little = "little to learn from" if split == "train" else "the score is mostly noise"
    texts = (
        (absent, f"no image with {', '.join(absent)}: {undefined}."),
        (everywhere, f"no image without {', '.join(everywhere)}: {undefined}."),
        (noisy, f"fewer than {_FEW_PATIENTS} patients with {', '.join(noisy)}: {little}."),
    )
    return [text for names, text in texts if names]


def _pairs_section(data: _SplitData) -> ReportSection:
    """Count images with two findings: the ten most frequent pairs, and all pairs on the page."""
    names = data.names[:-1]
    found = data.labels[data.rows["all"], :-1].astype(np.int64)
    together = found.T @ found
    images = np.diag(together)
    # Share of the row's images that have the column's finding too; the diagonal is always 1.
    shares = together / np.maximum(images, 1)[:, None]
    np.fill_diagonal(shares, 0.0)
    heat = ReportTable(
        "Images with both findings, over all splits; the diagonal counts all images with the"
        " finding. The darker a cell, the larger the share of the row's images that have the"
        " column's finding too.",
        ["", *names],
        [[name, *map(_count, together[row])] for row, name in enumerate(names)],
        shades=shares,
    )
    above = np.triu_indices(len(names), k=1)
    expected = np.outer(images, images) / max(1, len(found))
    pairs = []
    for position in np.argsort(-together[above], kind="stable")[:10]:
        one, other = above[0][position], above[1][position]
        both = together[one, other]
        if both:
            shares_text = [_percent(both, images[one]), _percent(both, images[other])]
            ratio = f"{both / expected[one, other]:.1f}"
            pairs.append([names[one], names[other], _count(both), *shares_text, ratio])
    top = ReportTable(
        "The ten most frequent pairs, over all splits",
        ["finding A", "finding B", "images", "% of A", "% of B", "observed / chance"],
        pairs,
        text_columns=2,
    )
    per_image = found.sum(axis=1)
    note = (
        f"{_count((per_image > 1).sum())} images have more than one finding, at most"
        f" {per_image.max()}."
    )
    return ReportSection("Pairs of findings", [top], notes=[note], markup=table_html(heat))


def _patients_section(data: _SplitData) -> ReportSection:
    """Compare the patients of the splits: images per patient, age, sex and view."""
    images_each = {
        part: np.unique(data.column("patient", part), return_counts=True)[1] for part in data.parts
    }
    ages = {part: data.column("age", part).dropna().to_numpy() for part in data.parts}
    rows: List[Tuple[str, Dict[str, str]]] = [
        ("images", {part: _count(len(data.rows[part])) for part in _PARTS}),
        ("patients", {part: _count(len(each)) for part, each in images_each.items()}),
        ("images per patient, mean", {part: f"{x.mean():.1f}" for part, x in images_each.items()}),
        (
            "images per patient, median (most)",
            {part: f"{np.median(x):.0f} ({x.max()})" for part, x in images_each.items()},
        ),
        (
            "age, median (range), years",
            {
                part: f"{np.median(x):.0f} ({x.min():.0f}-{x.max():.0f})"
                for part, x in ages.items()
                if len(x)
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
    table = ReportTable(
        "Patients and images by split; percent of the split's images",
        ["", *_PARTS],
        [[name, *(cells.get(part, "-") for part in _PARTS)] for name, cells in rows],
    )
    each = {split: images_each[split] for split in data.splits}
    known = {split: ages[split] for split in data.splits if len(ages[split])}
    figures = [figure_html(images_per_patient_figure(each), "Images per patient, by split")]
    if known:
        figures.insert(0, figure_html(age_figure(known), "Age by split, in steps of five years"))
    title = "Age, sex, view and images per patient"
    return ReportSection(title, [table], markup=_side_by_side(*figures))


def _values(data: _SplitData, name: str) -> List[Tuple[str, Dict[str, str]]]:
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
        rows.insert(-1, (f"{name}, other values", cells))
    return rows


def _skipped_section(data: _SplitData) -> ReportSection:
    skipped = data.module.skipped
    if skipped.empty:
        return ReportSection("Missing and skipped images", notes=["None."])
    counts = skipped["reason"].value_counts()
    reasons = [[_count(count), str(reason)] for reason, count in counts.items()]
    if len(reasons) > 10:
        reasons = [*reasons[:10], [_count(counts.iloc[10:].sum()), "other reasons"]]
    # Rare reasons first, three images each, so that missing images do not hide damaged ones.
    rarest = np.argsort(skipped["reason"].map(counts).to_numpy(), kind="stable")
    examples = skipped[["image", "reason"]].iloc[rarest].groupby("reason", sort=False).head(3)[:10]
    warning = f"Images of the CSV that are missing or were skipped: {_count(len(skipped))}."
    tables = [
        ReportTable("Reasons", ["images", "reason"], reasons, text_columns=2),
        ReportTable(
            "Examples, at most three per reason, rare reasons first",
            ["image", "reason"],
            examples.astype(str).to_numpy().tolist(),
            text_columns=2,
        ),
    ]
    return ReportSection("Missing and skipped images", tables, [warning])


def _boxes_section(data: _SplitData) -> Optional[ReportSection]:
    boxes = data.module.records.boxes
    if boxes.empty:
        return None
    area = 100.0 * boxes["width"] * boxes["height"] / IMAGE_PIXELS**2
    rows = []
    for name in data.names[:-1]:
        of_finding = (boxes["finding"] == name).to_numpy()
        if of_finding.any():
            images = boxes["row"][of_finding]
            counts = [_count(images.isin(data.rows[part]).sum()) for part in _PARTS]
            rows.append([name, *counts, f"{area[of_finding].median():.2f}"])
    header = ["finding", *_PARTS, "median area, % of image"]
    table = ReportTable("Boxes by finding and split", header, rows)
    note = f"{_count(len(boxes))} boxes on {_count(boxes['row'].nunique())} images."
    return ReportSection("Boxes around findings", [table], notes=[note])


def _relabels_section(data: _SplitData) -> Optional[ReportSection]:
    answers = data.module.records.relabels
    if np.isnan(answers).all():
        return None
    rows = []
    for column, label in enumerate(RELABELS):
        read = np.flatnonzero(~np.isnan(answers[:, column]))
        second = answers[read, column] == 1
        cells = [label, _count(len(read)), _count(second.sum())]
        if label not in _MEANING:
            rows.append([*cells, *["-"] * 5])
            continue
        names = [data.names.index(name) for name in _MEANING[label]]
        first = data.labels[read][:, names].any(axis=1)
        both = (first & second).sum()
        counts = map(_count, (both, (first & ~second).sum(), (~first & second).sum()))
        rows.append([*cells, *counts, _percent(both, first.sum()), _percent(both, second.sum())])
    header = ["label", "images read", "positive", "both", "CSV only", "readers only"]
    table = ReportTable(
        "The CSV's labels compared with the radiologists' (Google, 2019)",
        [*header, "PPV, %", "sensitivity, %"],
        rows,
    )
    meanings = "; ".join(
        f"{label} with {' or '.join(names)}" for label, names in _MEANING.items() if len(names) > 1
    )
    images = (~np.isnan(answers)).any(axis=1).sum()
    note = (
        f"{_count(images)} images have a second reading. They are no random sample, so the rates do"
        f" not hold for the whole data set. The CSV's findings are compared as follows: {meanings}."
    )
    return ReportSection("Radiologists' second reading", [table], notes=[note])


def _samples_section(data: _SplitData, seed: int) -> ReportSection:
    boxes = data.module.records.boxes
    rows = choose_images(data.labels, data.rows["all"], data.names, boxes, seed=seed)
    findings = {
        row: [name for name, found in zip(data.names[:-1], data.labels[row]) if found]
        for row in rows
    }
    note = (
        f"The page shows {len(rows)} images chosen at random with seed {seed}: one per finding, one"
        " with its box if there are boxes, and some without a finding."
    )
    return ReportSection(
        "Sample images", notes=[note], markup=image_cards(data.module, rows, findings)
    )


def _side_by_side(*figures: str) -> str:
    return f'<div class="side-by-side">{"".join(figures)}</div>'


def _count(value: int) -> str:
    """Format a count: ``"112,120"``."""
    return f"{int(value):,}"


def _percent(part: int, whole: int) -> str:
    """Format a share in percent: ``"53.8"``; ``"-"`` if `whole` is 0."""
    return f"{100.0 * part / whole:.1f}" if whole else "-"


def _share(count: int, data: _SplitData, part: str) -> str:
    return f"{_count(count)} ({_percent(count, len(data.rows[part]))} %)"
