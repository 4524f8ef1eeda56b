"""The data report: its page in a parser, its numbers compared with pandas on the CSV."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Dict, List, NamedTuple

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.schema import Config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.labels import FINDINGS
from cxr_vit.dataset_report import page as report_page
from cxr_vit.dataset_report.page import (
    Section,
    Table,
    choose_images,
    html_page,
    text_report,
)
from cxr_vit.dataset_report.report import write_data_report
from cxr_vit.web_page import printable

COUNTS = "Images and patients with each finding"
PEOPLE = "Patients and images by split; percent of the split's images"
EXAMPLES = "Examples, at most three per reason, rare reasons first"
PARTS = ["train", "val", "test", "all"]
HOSTILE = "<script>&\"'.png"


class Report(NamedTuple):
    """A written report and its data."""

    module: ChestXrayDataModule
    text: str
    page: str

    @property
    def root(self) -> ElementTree.Element:
        return ElementTree.fromstring(self.page)

    def tables(self) -> Dict[str, List[List[str]]]:
        """Caption -> rows of texts, with the header."""
        found = {}
        for section in self.root.iter("section"):
            captions = [p.text for p in section.iter("p") if p.get("class") == "caption"]
            for caption, table in zip(captions, section.iter("table")):
                found[caption] = [
                    ["".join(cell.itertext()) for cell in row] for row in table.iter("tr")
                ]
        return found

    def rows(self, caption: str) -> Dict[str, List[str]]:
        """First cell -> the others."""
        return {first: others for first, *others in self.tables()[caption]}

    def raw(self) -> Dict[str, pd.DataFrame]:
        """Split -> its rows of the CSV, as pandas reads them."""
        csv = pd.read_csv(self.module.csv, index_col=False)
        names = self.module.records.table["image"]
        listed = {part: names.iloc[getattr(self.module.splits, part)] for part in PARTS[:3]}
        listed["all"] = pd.concat(list(listed.values()))
        return {part: csv[csv["Image Index"].isin(images)] for part, images in listed.items()}


def _replace_skipped(monkeypatch, module, skipped):
    monkeypatch.setattr(module, "_content", module.content._replace(skipped=skipped))


def report_of(module: ChestXrayDataModule, folder: Path, **options: int) -> Report:
    text = write_data_report(module, folder / "report.html", **options)
    return Report(module, text, (folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(sample_root, tmp_path_factory):
    data = DataSection(root=str(sample_root), image_size=32, val_fraction=0.2)
    return report_of(ChestXrayDataModule(Config(data=data)), tmp_path_factory.mktemp("report"))


HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
)


def write_hand_made(root: Path) -> None:
    """Write 40 images of 20 patients; one is missing, one damaged."""
    (root / "images").mkdir(parents=True)
    names, rows = [], []
    for row in range(40):
        patient = row // 2
        name = HOSTILE if row == 0 else f"{patient:08d}_{row % 2:03d}.png"
        finding = {0: "Mass", 1: "Mass|Nodule", 2: "Effusion"}.get(row % 4, "No Finding")
        sex = "<i>" if row == 0 else "F"
        rows.append(f'"{name.replace(chr(34), chr(34) * 2)}",{finding},0,{patient},,{sex},')
        names.append(name)
        Image.new("L", (16, 16), row).save(root / "images" / name)
    (root / "images" / names[2]).unlink()
    (root / "images" / names[3]).write_bytes(b"<html>go away</html>")
    csv = "\n".join([HEADER, *rows]) + "\n"
    (root / "Data_Entry_2017_v2020.csv").write_text(csv, encoding="utf-8")


@pytest.fixture
def hand_made(tmp_path):
    write_hand_made(tmp_path / "nih")
    return DataSection(
        root=str(tmp_path / "nih"),
        image_size=16,
        split="patient",
        val_fraction=0.2,
        test_fraction=0.3,
        on_missing="skip",
        on_bad_image="skip",
    )


# The page


class Tags(HTMLParser):
    """All elements of a page; asserts that each is closed in order."""

    VOID = ("meta", "br", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: List[str] = []
        self.found: List[str] = []
        self.attributes: List[tuple] = []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_complete_and_self_contained(report):
    assert report.page.startswith("<!DOCTYPE html>\n")
    tags = Tags()
    tags.feed(report.page)
    tags.close()
    assert tags.open == []
    assert not {"script", "link", "iframe", "object"} & set(tags.found)
    sources = [value for name, value in tags.attributes if name in ("src", "href")]
    assert len(sources) > 10
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in sources)
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert "http://" not in report.page and "https://" not in report.page


def test_page_has_a_language_a_title_and_fits_a_phone(report):
    root = report.root
    assert root.get("lang") == "en"
    assert root.findtext("head/title") == f"Data report: {report.module.csv.name}"
    metas = {meta.get("name"): meta.get("content") for meta in root.iter("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    # Each section has a heading, each table and picture a name.
    assert all(section.findtext("h2") for section in root.iter("section"))
    assert all(image.get("alt") for image in root.iter("img"))
    assert all(drawing.get("aria-label") for drawing in root.iter("svg"))
    assert len(report.tables()) == len(list(root.iter("table")))


@pytest.mark.parametrize("width", [400, 1400])
def test_browser_shows_the_page_and_reports_no_problem(report, browser, tmp_path, width):
    (tmp_path / "page.html").write_text(report.page, encoding="utf-8")
    browser.open(tmp_path / "page.html", width)
    widths = "Array.from(document.images, image => image.naturalWidth)"
    assert min(browser.evaluate(widths)) > 100
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    shaded = "document.querySelector('[class^=shade-]:not(.shade-0)')"
    shade = browser.evaluate(f"getComputedStyle({shaded}).backgroundColor")
    assert shade.startswith("rgba(31, 119, 180, 0.")
    assert browser.problems == []


def test_every_figure_is_a_picture(report):
    figures = [image.get("src").split(",")[1] for image in report.root.iter("img")]
    assert len(figures) == 3
    assert all(b"<svg" in base64.b64decode(figure) for figure in figures)


def test_page_begins_with_the_notice(report):
    for words in ("research only; not a medical device", "the page shows patients' images"):
        assert words in " ".join(report.root.find("body/p").itertext())
        assert words in " ".join(report.text.split())


def test_same_data_and_seed_make_the_same_page_and_another_seed_another(report, tmp_path):
    assert report_of(report.module, tmp_path).page == report.page
    assert report_of(report.module, tmp_path, seed=1).page != report.page


def test_page_is_replaced_atomically(report, tmp_path, monkeypatch):
    out = tmp_path / "new" / "folder" / "page.html"
    write_data_report(report.module, out)
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    before = out.read_text(encoding="utf-8")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_data_report(report.module, out, seed=1)
    assert out.read_text(encoding="utf-8") == before


# The numbers


def test_facts_describe_the_data_set(report):
    facts = report.tables()["Files and sizes"]
    prints = report.module.fingerprint()
    given = dict(facts)
    assert given["label CSV"] == str(report.module.csv)
    assert given["CSV format"] == report.module.records.variant
    assert given["CSV SHA-256"] == prints["csv_sha256"]
    assert given["split SHA-256"] == prints["split_sha256"]
    assert given["split"].startswith("official")
    sizes = {part: len(rows) for part, rows in report.raw().items()}
    assert given["images"] == "{all} (train {train}, val {val}, test {test})".format(**sizes)
    assert given["patients"] == str(report.raw()["all"]["Patient ID"].nunique())
    assert "No patient is in two splits." in report.text
    assert prints["csv_sha256"] in report.text and prints["split_sha256"] in report.text


def test_counts_of_findings_match_pandas(report):
    rows = report.rows(COUNTS)
    assert list(rows)[2:] == [*FINDINGS, "No Finding"]
    raw = report.raw()
    has = {part: images["Finding Labels"].str.get_dummies("|") == 1 for part, images in raw.items()}
    for name in rows:
        if name in ("", "finding"):
            continue
        found = [raw[part][has[part][name]] if name in has[part] else [] for part in PARTS]
        images = [len(rows_of) for rows_of in found]
        patients = [len(set(rows_of["Patient ID"])) if len(rows_of) else 0 for rows_of in found]
        shares = [f"{100 * count / len(raw[part]):.1f}" for count, part in zip(images, PARTS)]
        assert rows[name] == [*map(str, images), *map(str, patients), *shares]


def test_counts_of_pairs_match_pandas(report):
    names = report.raw()["all"]["Finding Labels"].str.split("|")
    caption = next(caption for caption in report.tables() if caption.startswith("Images with both"))
    rows = report.rows(caption)
    counts = {}
    for one in FINDINGS:
        for column, other in enumerate(FINDINGS):
            counts[one, other] = sum(one in found and other in found for found in names)
            assert rows[one][column] == str(counts[one, other])
    top = report.tables()["The ten most frequent pairs, over all splits"][1:]
    shown = [int(images) for _, _, images, *_ in top]
    pairs = [count for (one, other), count in counts.items() if one < other and count]
    assert shown == sorted(pairs, reverse=True)[:10]
    for one, other, images, of_one, of_other, chance in top:
        assert int(images) == counts[one, other]
        assert of_one == f"{100 * int(images) / counts[one, one]:.1f}"
        assert of_other == f"{100 * int(images) / counts[other, other]:.1f}"
        expected = counts[one, one] * counts[other, other] / len(names)
        assert chance == f"{int(images) / expected:.1f}"


def test_cells_are_shaded_by_their_share_of_the_row(report):
    table = next(table for table in report.root.iter("table") if table.get("class") == "heat")
    for place, row in enumerate(table.find("tbody").iter("tr")):
        counts = [int(cell.text) for cell in row.iter("td")]
        shades = [int(cell.get("class")[len("shade-") :]) for cell in row.iter("td")]
        expected = np.array(counts) / max(1, counts[place])
        expected[place] = 0.0
        assert shades == np.round(20 * expected).tolist()
    assert ".shade-20 { background" in report.page


def test_facts_of_patients_match_pandas(report):
    rows = report.rows(PEOPLE)
    for column, (part, images) in enumerate((part, report.raw()[part]) for part in PARTS):
        cells = {name: values[column] for name, values in rows.items()}
        each = images.groupby("Patient ID").size()
        ages = images["Patient Age"]

        def share(mask):
            return f"{mask.sum()} ({100 * mask.sum() / len(mask):.1f} %)"

        assert cells["images"] == str(len(images))
        assert cells["patients"] == str(len(each))
        assert cells["images per patient, mean"] == f"{each.mean():.1f}"
        assert cells["images per patient, median (most)"] == f"{each.median():.0f} ({each.max()})"
        span = f"{ages.median():.0f} ({ages.min()}-{ages.max()})"
        assert cells["age, median (range), years"] == span, part
        assert cells["under 18 years"] == share(ages < 18)
        assert cells["sex F"] == share(images["Patient Gender"] == "F")
        assert cells["sex unknown"] == share(images["Patient Gender"] == "")
        assert cells["view AP"] == share(images["View Position"] == "AP")


def test_boxes_are_counted_and_drawn(report):
    boxes = report.module.records.boxes
    rows = report.rows("Boxes by finding and split")
    splits = {part: getattr(report.module.splits, part) for part in PARTS[:3]}
    for name, of_finding in boxes.groupby("finding"):
        counts = [int(of_finding["row"].isin(images).sum()) for images in splits.values()]
        area = (of_finding["width"] * of_finding["height"]).median() / 1024**2
        assert rows[name] == [*map(str, [*counts, len(of_finding)]), f"{100 * area:.2f}"]
    drawn = {
        tuple(float(shape.get(side)) for side in ("x", "y", "width", "height"))
        for shape in report.root.iter("rect")
    }
    given = boxes[["x", "y", "width", "height"]].round(1).to_numpy().tolist()
    assert drawn and drawn <= set(map(tuple, given))
    assert "boxes on" in report.text


def test_relabels_are_compared_with_the_labels_of_the_csv(report, tmp_path):
    records = report.module.records
    images = records.table["image"]
    again = images.iloc[:30]
    random = np.random.default_rng(0)
    answers = pd.DataFrame({"Image Index": again})
    for name in ("Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass"):
        answers[name] = random.choice(["YES", "NO"], len(again))
    answers.to_csv(tmp_path / "second_reading.csv", index=False)
    relabels = str(tmp_path / "second_reading.csv")
    data = report.module.data.model_copy(update={"relabels": relabels})
    second = report_of(ChestXrayDataModule(Config(data=data)), tmp_path)
    rows = second.rows("The CSV's labels compared with the radiologists' (Google, 2019)")
    csv = records.table["findings"].iloc[:30].str.contains("Nodule|Mass").to_numpy()
    read = (answers["Nodule or mass"] == "YES").to_numpy()
    counts = [30, read.sum(), (csv & read).sum(), (csv & ~read).sum(), (~csv & read).sum()]
    rates = [100 * (csv & read).sum() / total.sum() for total in (csv, read)]
    assert rows["Nodule or mass"] == [*map(str, counts), *(f"{rate:.1f}" for rate in rates)]
    assert rows["Fracture"][2:] == ["-"] * 5
    assert "second reading" not in report.text


def test_no_finding_as_a_class_changes_no_number(report, tmp_path):
    data = report.module.data.model_copy(update={"include_no_finding": True})
    other = report_of(ChestXrayDataModule(Config(data=data)), tmp_path)
    assert other.rows(COUNTS) == report.rows(COUNTS)
    assert len(other.module.names) == 15


# The text


def test_text_fits_a_terminal_and_its_columns_align(report):
    lines = report.text.splitlines()
    paths = str(report.module.csv)
    assert all(len(line) <= 110 or paths in line for line in lines)
    assert not [line for line in lines if line != line.rstrip()]
    start = next(place for place, line in enumerate(lines) if line.startswith("Atelectasis"))
    table = lines[start : start + 15]
    assert len({len(line) for line in table}) == 1
    assert table[-1].split()[:2] == ["No", "Finding"]


def test_text_has_the_numbers_of_the_page(report):
    for name, cells in report.rows(COUNTS).items():
        if name in FINDINGS:
            line = next(line for line in report.text.splitlines() if line.startswith(f"{name} "))
            assert line.split() == [name, *cells]


def test_long_last_column_is_wrapped_below_itself():
    table = Table("names", ["image", "reason"], [["a.png", "word " * 40]], text_columns=2)
    lines = text_report("title", "notice", [Section("section", [table])]).splitlines()
    beginning = lines.index("a.png  " + " ".join(["word"] * 20))
    assert lines[beginning + 1] == " " * 7 + " ".join(["word"] * 20)


# Unusual data


def test_finding_that_a_split_cannot_score_is_warned_of(hand_made, tmp_path):
    report = report_of(ChestXrayDataModule(Config(data=hand_made)), tmp_path)
    warnings = [p.text for p in report.root.iter("p") if p.get("class") == "warning"]
    absent = next(text for text in warnings if text.startswith("val: no image with"))
    assert "Hernia" in absent and "Mass" not in absent and "undefined" in absent
    assert any(text.startswith("train: no image with") and "Hernia" in text for text in warnings)
    few = next(text for text in warnings if text.startswith("test: fewer than 10 patients"))
    patients = report.rows(COUNTS)["Mass"][6]
    assert f"Mass ({patients})" in few and "mostly noise" in few
    assert "! val: no image with" in report.text


def test_finding_that_all_images_have_is_warned_of(hand_made, tmp_path):
    module = ChestXrayDataModule(Config(data=hand_made))
    module.records.labels[module.splits.val, FINDINGS.index("Edema")] = 1
    report = report_of(module, tmp_path)
    assert "! val: no image without Edema: the score is undefined." in report.text


def test_split_without_images_and_shared_patients_are_warned_of(hand_made, tmp_path):
    data = hand_made.model_copy(update={"split": "random", "test_fraction": 0.0})
    report = report_of(ChestXrayDataModule(Config(data=data)), tmp_path)
    assert "! test: no images." in report.text
    assert "images share a patient with train" in report.text
    assert report.rows(COUNTS)["Mass"][-2] == "-"
    assert report.rows(PEOPLE)["patients"][2] == "-"


def test_unknown_labels_are_counted_and_are_neither_found_nor_absent(hand_made, tmp_path):
    module = ChestXrayDataModule(Config(data=hand_made))
    labels, splits = module.records.labels, module.splits
    mass, nodule = FINDINGS.index("Mass"), FINDINGS.index("Nodule")
    labels[splits.train, nodule] = -1
    labels[splits.val[:2], mass] = -1
    report = report_of(module, tmp_path)
    rows = report.rows(COUNTS)
    unknown = report.rows(next(caption for caption in report.tables() if "unknown" in caption))
    sizes = [len(splits.train), len(splits.val), len(splits.test)]
    assert unknown["Nodule"][:4] == [str(sizes[0]), "0", "0", str(sizes[0])]
    assert unknown["Mass"][:5] == ["0", "2", "0", "2", "0.0"]
    assert rows["Nodule"][0] == "0" and rows["Nodule"][8] == "-", "of no known label"
    known = labels[splits.val, mass] >= 0
    positive = (labels[splits.val, mass] == 1).sum()
    assert rows["Mass"][9] == f"{100 * positive / known.sum():.1f}"
    none = [(labels[rows] == 0).all(axis=1).sum() for rows in splits[:3]]
    assert rows["No Finding"][:3] == list(map(str, none)) and none[0] == 0
    assert f"unknown labels, which count in no loss and no score: train {100 / 14:.1f} %, val" in (
        module.describe()
    )
    pair = report.tables()["The ten most frequent pairs, over all splits"][1:]
    both = (labels[:, [mass, nodule]] == 1).all(axis=1).sum()
    of_mass = ((labels[:, mass] == 1) & (labels[:, nodule] >= 0)).sum()
    assert pair[0][:4] == ["Mass", "Nodule", str(both), f"{100 * both / of_mass:.1f}"]


def test_of_many_findings_the_most_frequent_pairs_are_shown(hand_made, tmp_path):
    module = ChestXrayDataModule(Config(data=hand_made))
    labels = np.zeros((len(module.records), 45), np.int8)
    labels[:, 5:] = np.arange(40) % 7 <= np.arange(len(labels))[:, None] % 9
    object.__setattr__(module.records, "labels", labels)
    module.names = ["$\\bad$", *(f"finding {column}" for column in range(1, 45))]
    report = report_of(module, tmp_path)
    (caption,) = [text for text in report.tables() if text.startswith("Images with both")]
    assert caption.endswith("Of 45 findings, the 40 most frequent ones are shown.")
    table = report.tables()[caption]
    assert table[0] == ["", *module.names[5:]] and len(table) == 1 + 40
    found = labels[np.concatenate(module.splits[:3])].astype(int)
    together = (found.T @ found)[5:, 5:]
    assert [row[1:] for row in table[1:]] == [list(map(str, row)) for row in together.tolist()]
    assert "; the 40 most frequent findings" in report.page


def test_column_of_no_finding_counts_as_it_is(hand_made, tmp_path):
    """In another place and spelling than NIH's, as in other data sets."""
    module = ChestXrayDataModule(Config(data=hand_made))
    module.names = ["no_finding", *FINDINGS[1:]]
    module.records.labels[:, 0] = 0
    module.records.labels[module.splits.test, 0] = 1
    rows = report_of(module, tmp_path).rows(COUNTS)
    assert list(rows)[-1] == "no_finding"
    assert rows["no_finding"][:3] == ["0", "0", str(len(module.splits.test))]


def test_skipped_images_are_counted_and_named(hand_made, tmp_path):
    report = report_of(ChestXrayDataModule(Config(data=hand_made)), tmp_path)
    skipped = report.module.skipped
    assert len(skipped) == 2
    assert "were skipped: 2." in report.text
    reasons = report.tables()["Reasons"][1:]
    assert sorted(reason for _, reason in reasons) == sorted(skipped["reason"])
    some = report.tables()[EXAMPLES][1:]
    assert some == skipped[["image", "reason"]].to_numpy().tolist()


def test_rare_reasons_come_first_and_the_remaining_ones_are_summed(report, tmp_path, monkeypatch):
    reasons = ["missing"] * 20 + [f"reason {number}" for number in range(12)]
    names = [f"{number}.png" for number in range(32)]
    skipped = pd.DataFrame({"image": names, "reason": reasons})
    _replace_skipped(monkeypatch, report.module, skipped)
    changed = report_of(report.module, tmp_path)
    counts = changed.tables()["Reasons"][1:]
    assert counts[0] == ["20", "missing"]
    assert counts[-1] == ["3", "other reasons"]
    assert sum(int(count) for count, _ in counts) == 32
    some = changed.tables()[EXAMPLES][1:]
    assert [name for name, _ in some] == names[20:30]


def test_three_images_of_each_reason_are_named(report, tmp_path, monkeypatch):
    names = [f"{number}.png" for number in range(15)]
    reasons = ["missing"] * 10 + ["empty"] * 5
    skipped = pd.DataFrame({"image": names, "reason": reasons})
    _replace_skipped(monkeypatch, report.module, skipped)
    some = report_of(report.module, tmp_path).tables()[EXAMPLES][1:]
    assert [name for name, _ in some] == [*names[10:13], *names[:3]]


def test_no_skipped_images_are_reported_as_none(report):
    assert report.module.skipped.empty
    assert "None." in report.text


def test_names_are_escaped(hand_made, tmp_path, monkeypatch):
    module = ChestXrayDataModule(Config(data=hand_made))
    bell = pd.DataFrame({"image": [f"\x1b[31m{HOSTILE}"], "reason": ["\udc80 <b>"]}, dtype=object)
    _replace_skipped(monkeypatch, module, bell)
    monkeypatch.setattr(report_page, "choose_images", lambda *_, **__: [0])
    report = report_of(module, tmp_path)
    assert "<script" not in report.page and "<b>&lt;" not in report.page
    assert report.tables()[EXAMPLES][1] == [
        f"\\x1b[31m{HOSTILE}",
        "\\udc80 <b>",
    ]
    assert "\x1b" not in report.text
    assert report.rows(PEOPLE)["sex <i>"][3].startswith("1 (")
    captions = ["".join(caption.itertext()) for caption in report.root.iter("figcaption")]
    assert any(HOSTILE in caption and "age unknown, <i>" in caption for caption in captions)


def test_unknown_ages_and_views_are_counted_but_not_drawn(hand_made, tmp_path):
    report = report_of(ChestXrayDataModule(Config(data=hand_made)), tmp_path)
    rows = report.rows(PEOPLE)
    assert rows["age unknown"][3] == rows["view unknown"][3] == "38 (100.0 %)"
    assert rows["age, median (range), years"] == ["-"] * 4
    assert not [image for image in report.root.iter("img") if "Age" in image.get("alt")]


def test_printable_escapes_control_characters_only():
    assert printable("Pleural_Thickening é 胸 <b>") == "Pleural_Thickening é 胸 <b>"
    assert printable("a\x1b\n\udcff") == "a\\x1b\\n\\udcff"


def test_texts_with_templates_are_not_rendered():
    page = html_page("{{ title }}", "{% if %}", [Section("{{ x }}", notes=["{# y #}"])])
    assert "<title>{{ title }}</title>" in page and "{% if %}" in page
    assert "<h2>{{ x }}</h2>" in page and "{# y #}" in page


# The images


def test_each_finding_is_shown_at_least_once_and_no_image_twice(report):
    cards = [figure for figure in report.root.iter("figure") if figure.find("svg") is not None]
    titles = [figure.findtext("figcaption/b").split(", ") for figure in cards]
    counts = report.rows(COUNTS)
    present = {name for name in FINDINGS if counts[name][3] != "0"}
    assert {name for names in titles for name in names} >= present
    assert titles.count(["No Finding"]) == 6
    texts = ["\n".join(figure.find("figcaption").itertext()) for figure in cards]
    images = [re.search(r"\d{8}_\d{3}\.png", text).group() for text in texts]
    assert len(set(images)) == len(images)


def test_card_shows_its_own_image_and_facts(report):
    table = report.module.records.table
    split_of = {
        table["image"][row]: part
        for part in PARTS[:3]
        for row in getattr(report.module.splits, part)
    }
    for figure in report.root.iter("figure"):
        picture = figure.find("svg/image")
        if picture is None:
            continue
        title, known, name, *_ = figure.find("figcaption").itertext()
        record = table[table["image"] == name].iloc[0]
        assert title.replace(", ", "|") == "|".join(
            sorted(record["findings"].split("|"), key=[*FINDINGS, "No Finding"].index)
        )
        age = f"{record['age']:.0f} years"
        assert known == f"{split_of[name]}, {age}, {record['sex']}, {record['view']}"
        split = report.module.dataset(split_of[name])
        image = split.read_images([split.image_names.index(name)])[0]
        data = base64.b64decode(picture.get("href").split(",")[1])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


def test_image_with_a_box_is_chosen_if_there_are_boxes():
    labels = np.ones((100, 2), dtype=bool)
    labels[:, 1] = ~labels[:, 0]
    boxes = pd.DataFrame({"row": [77], "finding": ["Mass"]})
    chosen = choose_images(labels, np.arange(100), ["Mass", "No Finding"], boxes, seed=3)
    assert 77 in chosen
    assert len(chosen) == 2
    none = boxes.iloc[:0]
    assert len(choose_images(labels, np.arange(100), ["Mass", "No Finding"], none, seed=3)) == 1
