"""Count findings, pairs of findings and patients by split, and write the report of a data set.

Only images in a split are counted; "all" is the splits together.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

import numpy as np
import pandas as pd

from cxr_vit.config.columns import is_no_finding
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.nih import IMAGE_PIXELS
from cxr_vit.data.records import NIH_FINDINGS, RELABELS, UNKNOWN
from cxr_vit.data.splits import SPLIT_NAMES, num_sharing_patients
from cxr_vit.dataset_report import page
from cxr_vit.dataset_report.page import Section, Table
from cxr_vit.files import write_text

NOTICE = (
    "For research only; not a medical device. With real data, the page shows patients' images:"
    " store it only where the data may be stored."
)

_PARTS: Tuple[str, ...] = (*SPLIT_NAMES, "all")

#: Findings of the table of all pairs and of the figure; more make a page that is hard to open.
_MOST_SHOWN = 40

#: The score of a finding with fewer patients in a split is mostly noise.
_FEW_PATIENTS = 10
_ADULT_YEARS = 18


class _Data:
    """A data set as the sections read it; its last label is that there is no finding.

    That is a column of the data set, or follows from the others where all of them are known.
    """

    def __init__(self, module: ChestXrayDataModule) -> None:
        labels, names = module.records.labels, module.names
        columns = [column for column, name in enumerate(names) if not is_no_finding(name)]
        none = [column for column, name in enumerate(names) if is_no_finding(name)]
        found = labels[:, columns]
        without = labels[:, none[0]] if none else _none_of(found)
        self.module = module
        self.table = module.records.table
        self.names = [names[column] for column in columns]
        self.names.append(names[none[0]] if none else module.records.without_finding)
        labels = np.column_stack([found, without])
        self.labels = labels == 1  # bool [N, len(names)]
        self.known = labels != UNKNOWN
        self.rows = {split: getattr(module.splits, split) for split in SPLIT_NAMES}
        self.rows["all"] = np.sort(np.concatenate(list(self.rows.values())))
        #: The parts that have images.
        self.parts = [part for part in _PARTS if len(self.rows[part])]

    def column(self, name: str, part: str) -> pd.Series:
        """Return a column of the table for the images of a split."""
        return self.table[name].iloc[self.rows[part]]


def _none_of(labels: np.ndarray) -> np.ndarray:
    """Return whether none of the labels is 1: `UNKNOWN` where one may be."""
    found = (labels == 1).any(axis=1)
    unknown = ~found & (labels == UNKNOWN).any(axis=1)
    return np.where(unknown, UNKNOWN, ~found)


def write_data_report(module: ChestXrayDataModule, out: Path, *, seed: int = 0) -> str:
    """Write the HTML report of a data set and return its text, for the terminal.

    Missing folders are made. `seed` chooses the sample images; the same data and seed make the same
    page. Raises DataError if a sample image cannot be read, OSError if `out` cannot be written.
    """
    data = _Data(module)
    title = f"Data report: {module.csv.name}"
    sections = [
        _facts_section(data),
        _findings_section(data),
        _pairs_section(data),
        _patients_section(data),
        _skipped_section(module.skipped),
        *_plain_section(module.plain_images()),
        *_boxes_section(data),
        *_relabels_section(data),
        _samples_section(data, seed),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page.html_page(title, NOTICE, sections))
    return page.text_report(title, NOTICE, sections)


def _facts_section(data: _Data) -> Section:
    module, rows = data.module, data.rows
    hashes = module.fingerprint()
    sizes = ", ".join(f"{split} {_count(len(rows[split]))}" for split in SPLIT_NAMES)
    facts = [
        ("label CSV", ", ".join(map(str, module.files))),
        ("CSV format", module.records.variant),
        ("CSV SHA-256", hashes["csv_sha256"]),
        ("split", ", ".join(filter(None, (module.splits.kind, module.splits.source)))),
        ("split SHA-256", hashes["split_sha256"]),
        ("images", f"{_count(len(rows['all']))} ({sizes})"),
        ("patients", _count(data.column("patient", "all").nunique())),
        ("labels", f"{len(module.names)} per image: {', '.join(module.names)}"),
    ]
    warnings = []
    for split, other in (("val", "train"), ("test", "train"), ("test", "val")):
        shared = num_sharing_patients(module.records, rows[split], rows[other])
        if shared:
            warnings.append(
                f"{_count(shared)} of {_count(len(rows[split]))} {split} images share a patient"
                f" with {other}: scores on {split} are too optimistic."
            )
    notes = [] if warnings else ["No patient is in two splits."]
    if (data.table["patient"] == data.table["image"]).all():
        notes = ["Patients are not known: each image counts as one of its own."]
    outside = len(data.table) - len(rows["all"])
    if outside:
        notes.append(f"{_count(outside)} images are in no split and are not counted below.")
    table = Table("Files and sizes", (), facts, text_columns=2)
    return Section("Data set", [table], warnings, notes)


def _findings_section(data: _Data) -> Section:
    """Count the images and patients with each finding; warn of findings that cannot be scored."""
    images, patients, known, percent = {}, {}, {}, {}
    for part in _PARTS:
        labels = data.labels[data.rows[part]]
        people = data.column("patient", part).to_numpy()
        images[part] = labels.sum(axis=0)
        patients[part] = [len(np.unique(people[column])) for column in labels.T]
        known[part] = data.known[data.rows[part]].sum(axis=0)
        percent[part] = 100.0 * images[part] / np.maximum(1, known[part])
    rows = []
    for column, name in enumerate(data.names):
        counts = [_count(of[part][column]) for of in (images, patients) for part in _PARTS]
        shares = [_percent(images[part][column], known[part][column]) for part in _PARTS]
        rows.append([name, *counts, *shares])
    whole = "% of images" if data.known.all() else "% where known"
    table = Table(
        "Images and patients with each finding",
        ["finding", *_PARTS * 3],
        rows,
        groups=[(what, len(_PARTS)) for what in ("images", "patients", whole)],
    )
    warnings = [
        f"{split}: {text}"
        for split in SPLIT_NAMES
        for text in _scarce(data, split, images[split], patients[split], known[split])
    ]
    shown = _most_frequent(images["all"][:-1])
    drawn = {split: percent[split][shown] for split in data.parts if split != "all"}
    caption = "Prevalence of each finding by split, percent of the split's images"
    if not data.known.all():
        caption += " whose label is known"
    if len(shown) < len(data.names) - 1:
        caption += f"; the {len(shown)} most frequent findings"
    figure = page.prevalence_figure(drawn, [data.names[column] for column in shown])
    tables = [table, *_unknown_tables(data, known)]
    return Section("Findings", tables, warnings, figures=[(figure, caption)])


def _unknown_tables(data: _Data, known: Dict[str, np.ndarray]) -> List[Table]:
    """Count the images whose label is unknown, if there are any, given those where it is known."""
    if data.known.all():
        return []
    totals = {part: len(data.rows[part]) for part in _PARTS}
    rows = []
    for column, name in enumerate(data.names):
        unknown = {part: totals[part] - known[part][column] for part in _PARTS}
        shares = [_percent(unknown[part], totals[part]) for part in _PARTS]
        rows.append([name, *(_count(unknown[part]) for part in _PARTS), *shares])
    return [
        Table(
            "Images whose label is unknown: neither the loss nor the finding's score counts them",
            ["finding", *_PARTS * 2],
            rows,
            groups=[(what, len(_PARTS)) for what in ("unknown", "% of images")],
        )
    ]


def _scarce(
    data: _Data,
    split: str,
    images: Sequence[int],
    patients: Sequence[int],
    known: Sequence[int],
) -> Iterator[str]:
    """Describe the labels that a split cannot score, or only with noise."""
    if len(data.rows[split]) == 0:
        if data.module.splits.kind != "all":
            yield "no images."
        return
    found = list(zip(data.names, images, patients, known))[: len(data.module.names)]
    absent = [name for name, number, _, _ in found if number == 0]
    everywhere = [name for name, number, _, total in found if 0 < number == total]
    noisy = [
        f"{name} ({people})"
        for name, number, people, total in found
        if 0 < number < total and people < _FEW_PATIENTS
    ]
    undefined = "nothing to learn from" if split == "train" else "the score is undefined"
    little = "little to learn from" if split == "train" else "the score is mostly noise"
    if absent:
        yield f"no image with {', '.join(absent)}: {undefined}."
    if everywhere:
        yield f"no image without {', '.join(everywhere)}: {undefined}."
    if noisy:
        yield f"fewer than {_FEW_PATIENTS} patients with {', '.join(noisy)}: {little}."


def _pairs_section(data: _Data) -> Section:
    """Count images with two findings: the ten most frequent pairs, and all pairs on the page."""
    names = data.names[:-1]
    found = data.labels[data.rows["all"], :-1].astype(np.int64)
    known = data.known[data.rows["all"], :-1].astype(np.int64)
    together = found.T @ found
    # Images with the row's finding, and all images, where the column's label is known.
    images, both_known = found.T @ known, known.T @ known
    # Share of the row's images that have the column's finding too; the diagonal is always 1.
    shares = together / np.maximum(images, 1)
    np.fill_diagonal(shares, 0.0)
    shown = _most_frequent(np.diagonal(together))
    few = f" Of {len(names)} findings, the {len(shown)} most frequent ones are shown."
    heat = Table(
        "Images with both findings, over all splits; the diagonal counts all images with the"
        " finding. The bluer a cell, the larger the share of the row's images that have the"
        f" column's finding too.{few if len(shown) < len(names) else ''}",
        ["", *(names[column] for column in shown)],
        [[names[row], *map(_count, together[row, shown])] for row in shown],
        shades=shares[np.ix_(shown, shown)],
    )
    above = np.triu_indices(len(names), k=1)
    expected = images * images.T / np.maximum(both_known, 1)
    pairs = []
    for one, other in np.transpose(above)[np.argsort(-together[above], kind="stable")[:10]]:
        both = together[one, other]
        if both:
            of_each = (images[one, other], images[other, one])
            shares_text = [_percent(both, count) for count in of_each]
            ratio = f"{both / expected[one, other]:.1f}"
            pairs.append([names[one], names[other], _count(both), *shares_text, ratio])
    top = Table(
        "The ten most frequent pairs, over all splits",
        ["finding A", "finding B", "images", "% of A", "% of B", "observed / chance"],
        pairs,
        text_columns=2,
    )
    per_image = found.sum(axis=1)
    several = _count((per_image > 1).sum())
    note = f"{several} images have more than one finding, at most {per_image.max()}."
    return Section("Pairs of findings", [top], notes=[note], markup=page.table_html(heat))


def _most_frequent(images: np.ndarray) -> np.ndarray:
    """Return the columns of the findings with the most images, in their order."""
    return np.sort(np.argsort(-images, kind="stable")[:_MOST_SHOWN])


def _patients_section(data: _Data) -> Section:
    """Compare the patients of the splits: images per patient, age, sex and view."""
    each = {
        part: np.unique(data.column("patient", part), return_counts=True)[1] for part in data.parts
    }
    ages = {part: data.column("age", part).dropna().to_numpy() for part in data.parts}
    cells = {part: _patient_facts(data, part, each[part], ages[part]) for part in data.parts}
    empty = {"images": "0"}
    table = Table(
        "Patients and images by split; percent of the split's images",
        ["", *_PARTS],
        [[name, *(cells.get(x, empty).get(name, "-") for x in _PARTS)] for name in cells["all"]],
    )
    del each["all"], ages["all"]
    known = {split: years for split, years in ages.items() if len(years)}
    figures = [(page.images_per_patient_figure(each), "Images per patient, by split")]
    if known:
        figures.insert(0, (page.age_figure(known), "Age by split, in steps of five years"))
    return Section("Age, sex, view and images per patient", [table], figures=figures)


def _patient_facts(data: _Data, part: str, each: np.ndarray, ages: np.ndarray) -> Dict[str, str]:
    """Return the rows of a part, given the images of each patient and the known ages."""
    total = len(data.rows[part])

    def share(count: int) -> str:
        return f"{_count(count)} ({_percent(count, total)} %)"

    median_age = f"{np.median(ages):.0f} ({ages.min():.0f}-{ages.max():.0f})" if len(ages) else "-"
    facts = {
        "images": _count(total),
        "patients": _count(len(each)),
        "images per patient, mean": f"{each.mean():.1f}",
        "images per patient, median (most)": f"{np.median(each):.0f} ({each.max()})",
        "age, median (range), years": median_age,
        f"under {_ADULT_YEARS} years": share((ages < _ADULT_YEARS).sum()),
        "age unknown": share(total - len(ages)),
    }
    for name in ("sex", "view"):
        # The five most frequent texts of all splits, the others, and the unknown.
        frequent = data.column(name, "all").value_counts().drop("", errors="ignore").index[:5]
        texts = data.column(name, part)
        facts.update({f"{name} {text}": share((texts == text).sum()) for text in sorted(frequent)})
        if not data.column(name, "all").isin([*frequent, ""]).all():
            facts[f"{name}, other values"] = share((~texts.isin([*frequent, ""])).sum())
        facts[f"{name} unknown"] = share((texts == "").sum())
    return facts


def _skipped_section(skipped: pd.DataFrame) -> Section:
    if skipped.empty:
        return Section("Missing and skipped images", notes=["None."])
    # Not with pandas' texts: a file's name may be no UTF-8.
    rows = [(str(image), str(reason)) for image, reason in zip(skipped["image"], skipped["reason"])]
    counts = Counter(reason for _, reason in rows).most_common()
    reasons = [[_count(count), reason] for reason, count in counts[:10]]
    if len(counts) > 10:
        reasons.append([_count(sum(count for _, count in counts[10:])), "other reasons"])
    # Rare reasons first, three images each, so that missing images do not hide damaged ones.
    number = dict(counts)
    rarest = sorted(rows, key=lambda row: number[row[1]])
    seen: Counter[str] = Counter()
    examples = []
    for row in rarest:
        seen[row[1]] += 1
        if seen[row[1]] <= 3:
            examples.append(row)
    warning = f"Images of the CSV that are missing or were skipped: {_count(len(skipped))}."
    caption = "Examples, at most three per reason, rare reasons first"
    tables = [
        Table("Reasons", ["images", "reason"], reasons, 2),
        Table(caption, ["image", "reason"], examples[:10], 2),
    ]
    return Section("Missing and skipped images", tables, [warning])


def _plain_section(images: Sequence[str]) -> List[Section]:
    if not images:
        return []
    warning = (
        f"Images whose pixels are all equal, as those of a black image: {_count(len(images))}."
        " They are used as they are; leave their rows out if they show nothing."
    )
    table = Table("The first ones", ["image"], [[name] for name in images[:10]], text_columns=1)
    return [Section("Images of one gray value", [table], [warning])]


def _boxes_section(data: _Data) -> List[Section]:
    boxes = data.module.records.boxes
    if boxes.empty:
        return []
    area = 100.0 * boxes["width"] * boxes["height"] / IMAGE_PIXELS**2
    rows = []
    for name in data.names[:-1]:
        of_finding = (boxes["finding"] == name).to_numpy()
        if of_finding.any():
            images = boxes["row"][of_finding]
            counts = [_count(images.isin(data.rows[part]).sum()) for part in _PARTS]
            rows.append([name, *counts, f"{area[of_finding].median():.2f}"])
    header = ["finding", *_PARTS, "median area, % of image"]
    table = Table("Boxes by finding and split", header, rows)
    note = f"{_count(len(boxes))} boxes on {_count(boxes['row'].nunique())} images."
    return [Section("Boxes around findings", [table], notes=[note])]


def _relabels_section(data: _Data) -> List[Section]:
    answers = data.module.records.relabels
    if np.isnan(answers).all():
        return []
    rows = []
    for column, label in enumerate(RELABELS):
        read = np.flatnonzero(~np.isnan(answers[:, column]))
        second = answers[read, column] == 1
        cells = [label, _count(len(read)), _count(second.sum())]
        if label not in NIH_FINDINGS:
            rows.append([*cells, *["-"] * 5])
            continue
        names = [data.names.index(name) for name in NIH_FINDINGS[label]]
        first = data.labels[read][:, names].any(axis=1)
        both = (first & second).sum()
        counts = map(_count, (both, (first & ~second).sum(), (~first & second).sum()))
        rows.append([*cells, *counts, _percent(both, first.sum()), _percent(both, second.sum())])
    header = ["label", "images read", "positive", "both", "CSV only", "readers only"]
    table = Table(
        "The CSV's labels compared with the radiologists' (Google, 2019)",
        [*header, "PPV, %", "sensitivity, %"],
        rows,
    )
    meanings = "; ".join(
        f"{label} with {' or '.join(names)}"
        for label, names in NIH_FINDINGS.items()
        if len(names) > 1
    )
    images = (~np.isnan(answers)).any(axis=1).sum()
    note = (
        f"{_count(images)} images have a second reading. They are no random sample, so the rates do"
        f" not hold for the whole data set. The CSV's findings are compared as follows: {meanings}."
    )
    return [Section("Radiologists' second reading", [table], notes=[note])]


def _samples_section(data: _Data, seed: int) -> Section:
    boxes = data.module.records.boxes
    rows = page.choose_images(data.labels, data.rows["all"], data.names, boxes, seed=seed)
    findings = {
        row: [name for name, found in zip(data.names[:-1], data.labels[row]) if found]
        for row in rows
    }
    note = (
        f"The page shows {len(rows)} images chosen at random with seed {seed}: one per finding, one"
        " with its box if there are boxes, and some without a finding."
    )
    markup = page.image_cards(data.module, rows, findings)
    return Section("Sample images", notes=[note], markup=markup)


def _count(value: int) -> str:
    return f"{int(value):,}"


def _percent(part: int, whole: int) -> str:
    """Format a share in percent: ``"53.8"``; ``"-"`` if `whole` is 0."""
    return f"{100.0 * part / whole:.1f}" if whole else "-"
