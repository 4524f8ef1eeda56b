"""What the data are, for a person: tables as text, and one HTML page with figures and films.

The films that count are those in a split; "all" is the splits together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import numpy as np

from cxr_vit.data.annotations import FILM_PIXELS
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.records import RELABELS
from cxr_vit.data.splits import SPLIT_NAMES, num_sharing_patients
from cxr_vit.evaluation.data_counts import (
    PARTS,
    SplitData,
    count_text,
    findings_section,
    gather,
    pairs_section,
    people_section,
    percent_text,
)
from cxr_vit.evaluation.data_figures import choose_films, film_cards
from cxr_vit.evaluation.data_page import Section, Table, html_page, text_report

__all__ = ["write_data_report"]

NOTICE = (
    "For research only; not a medical device. Where the data are real, the page shows patients'"
    " films: keep it where the data may be kept."
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
        The data; films are read for the page of samples only.
    out
        The HTML file, written aside and renamed; its folder is made if it is not there.
    seed
        Seed of the draw of sample films. The same data and seed give the same page.

    Returns
    -------
    str
        The report without figures and films, lines of at most 110 characters where words allow.

    Raises
    ------
    DataError
        If a sample film cannot be read.
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
        ("films", f"{count_text(len(rows['all']))} ({_sizes(data)})"),
        ("patients", count_text(data.column("patient", "all").nunique())),
        ("labels", f"{len(module.names)} a film: {', '.join(module.names)}"),
    ]
    warnings = [
        f"{count_text(shared)} of {count_text(len(rows[split]))} {split} films share a patient with"
        f" {other}: scores on {split} are flattered."
        for split, other in (("val", "train"), ("test", "train"), ("test", "val"))
        for shared in [num_sharing_patients(module.records, rows[split], rows[other])]
        if shared
    ]
    notes = [] if warnings else ["No patient is in two splits."]
    outside = len(data.table) - len(rows["all"])
    if outside:
        notes.append(f"{count_text(outside)} films are in no split and are not counted below.")
    table = Table("What was read", (), facts, text_columns=2)
    return Section("The data", [table], warnings, notes)


def _sizes(data: SplitData) -> str:
    return ", ".join(f"{split} {count_text(len(data.rows[split]))}" for split in SPLIT_NAMES)


def _left_out(data: SplitData) -> Section:
    skipped = data.module.skipped
    if skipped.empty:
        return Section("Missing and skipped films", notes=["None."])
    counts = skipped["reason"].value_counts()
    reasons = [[count_text(count), str(reason)] for reason, count in counts.items()]
    if len(reasons) > 10:
        reasons = [*reasons[:10], [count_text(counts.iloc[10:].sum()), "for other reasons"]]
    # Rare reasons first: ten of 112,000 missing films would hide the three damaged ones.
    rarest = np.argsort(skipped["reason"].map(counts).to_numpy(), kind="stable")[:10]
    some = skipped[["image", "reason"]].iloc[rarest].astype(str).to_numpy().tolist()
    warning = f"Films of the CSV that are missing or were left out: {count_text(len(skipped))}."
    return Section(
        "Missing and skipped films",
        [
            Table("How many and why", ["films", "reason"], reasons, text_columns=2),
            Table("Ten of them, rare reasons first", ["image", "reason"], some, text_columns=2),
        ],
        [warning],
    )


def _boxes(data: SplitData) -> Optional[Section]:
    boxes = data.module.records.boxes
    if boxes.empty:
        return None
    area = 100.0 * boxes["width"] * boxes["height"] / FILM_PIXELS**2
    rows = []
    for name in data.names[:-1]:
        of_finding = (boxes["finding"] == name).to_numpy()
        if not of_finding.any():
            continue
        films = boxes["row"][of_finding]
        counts = [int(films.isin(data.rows[part]).sum()) for part in PARTS]
        size = f"{area[of_finding].median():.2f}"
        rows.append([name, *map(count_text, counts), size])
    note = f"{count_text(len(boxes))} boxes on {count_text(boxes['row'].nunique())} films."
    table = Table("Boxes by finding and split", ["finding", *PARTS, "median area, % of film"], rows)
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
    header = ["label", "films read", "positive", "both", "CSV only", "readers only"]
    table = Table(
        "The CSV's labels against the radiologists' (Google, 2019)",
        [*header, "PPV, %", "sensitivity, %"],
        rows,
    )
    meanings = "; ".join(
        f"{label} as {' or '.join(names)}" for label, names in _MEANING.items() if len(names) > 1
    )
    films = int((~np.isnan(answers)).any(axis=1).sum())
    note = (
        f"{count_text(films)} films were read again. They were not drawn at random, so the rates"
        f" are not those of the whole set. The CSV has {meanings}."
    )
    return Section("Radiologists' second reading", [table], notes=[note])


def _samples(data: SplitData, seed: int) -> Section:
    boxes = data.module.records.boxes
    rows = choose_films(data.labels, data.rows["all"], data.names, boxes, seed=seed)
    findings = {
        row: [name for name, found in zip(data.names[:-1], data.labels[row]) if found]
        for row in rows
    }
    note = (
        f"The page shows {len(rows)} films drawn with seed {seed}: of each finding one, and one"
        " with its box where there are boxes, and some without a finding."
    )
    markup = film_cards(data.module, rows, findings)
    return Section("Sample films", notes=[note], markup=markup)
