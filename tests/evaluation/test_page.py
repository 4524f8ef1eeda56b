"""The page of an evaluation: its texts in a parser, and the page in a real browser."""

import base64
import hashlib
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from example_metrics import example_metrics, random_predictions
from PIL import Image

from cxr_vit.data.labels import FINDINGS
from cxr_vit.evaluation.cases import Overlays
from cxr_vit.evaluation.page import OPTIONAL_KEYS, PageContext, report_page

HOSTILE = "<script>alert('1')</script> & \"quoted\" \u05d0\u05d1\u05d2"
NAMES = ["Mass", "Nodule", "Edema", HOSTILE, "Hernia", "No Finding"]


def context(images=None):
    text = "run: {name: demo}  # <b>\ndata: {root: x}\n"
    overlays = Overlays("Below is <i>a map</i>.", covered)
    return PageContext("runs/demo <i>, test", text, {"torch": "2.13.0"}, images, overlays)


def covered(image, finding):
    """Return an overlay; none for one finding."""
    return None if finding == "Nodule" else image.convert("RGB")


def picture(name):
    """Return an image of a gray value of its own; none for one patient."""
    return None if name.startswith("00000001") else Image.new("L", (400, 300), hash(name) % 256)


@pytest.fixture(scope="module")
def predictions():
    found = random_predictions(NAMES, images=300)
    found.labels[:, NAMES.index("Hernia")] = 0
    found.labels[:5, 0] = -1
    found.table.loc[0, "image"] = "\u202e<img src=x onerror=alert(2)>.png"
    found.table.loc[:20, "sex"] = "<b>&"
    found.probabilities[0, 1] = 1.0  # the image is a case
    return found


@pytest.fixture(scope="module")
def metrics(predictions):
    return example_metrics(predictions, count=10)


@pytest.fixture(scope="module")
def path(predictions, metrics, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_page(metrics, predictions, context(picture)), encoding="utf-8")
    return path


def written(metrics, predictions, given=None):
    return report_page(metrics, predictions, given or context())


@pytest.fixture(scope="module")
def root(path):
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def section(root, heading):
    return next((part for part in root.iter("section") if part.findtext("h2") == heading), None)


def tables(part):
    """Caption -> rows of texts."""
    captions = [text.text for text in part.iter("p") if text.get("class") == "caption"]
    return {
        caption: [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
        for caption, table in zip(captions, part.iter("table"))
    }


def rows_of(part, beginning):
    """First cell -> the others, of the table whose caption begins so."""
    (found,) = (rows for caption, rows in tables(part).items() if caption.startswith(beginning))
    return {first: others for first, *others in found}


# The text


def test_page_has_the_answers_first_and_the_notice_twice(root):
    headings = [part.findtext("h2") for part in root.iter("section")]
    assert headings[:4] == ["How good?", "How sure?", "For whom?", "Where not?"]
    assert headings[4:7] == ["Scores by finding", "ROC curves", "Precision and recall"]
    assert headings[-2:] == ["Model and data", "Limits"]
    paragraphs = list(root.find("body"))
    notices = [each for each in paragraphs if each.get("class") == "notice"]
    assert len(notices) == 2
    assert all("not a medical device" in each.text for each in notices)


def test_table_has_the_scores(root, metrics):
    rows = rows_of(section(root, "Scores by finding"), "Scores of each label")
    assert list(rows)[1 : 1 + len(NAMES)] == NAMES
    for name, each in metrics["findings"].items():
        texts = " ".join(rows[name])
        for key in ("auroc", "average_precision", "brier"):
            if each[key] is not None:
                has_limits = each[key]["low"] is not None
                form = "{value:.3f} {low:.3f} to {high:.3f}" if has_limits else "{value:.3f}"
                shown = form.format(**each[key])
                assert shown in texts, (name, key)
        assert str(each["positives"]) in rows[name] and str(each["unknown"]) in rows[name]
    assert rows["Hernia"][0] == "-"
    macro = metrics["means"]["macro"]["auroc"]["value"]
    assert rows["mean of the findings (macro)"][0].startswith(f"{macro:.3f}")


def test_operating_points_have_counts_and_ratios(root, metrics):
    part = section(root, "Operating points")
    assert len(tables(part)) == 4
    row = rows_of(part, "Highest sensitivity")["Mass"]
    point = metrics["operating_points"]["points"]["Mass"]["youden"]
    assert row[0] == f"{point['threshold']:.3g}"
    assert row[1].startswith(f"{point['sensitivity']['value']:.3f}")
    counts = ("true_positives", "false_positives", "true_negatives", "false_negatives")
    assert row[-4:] == [str(point[count]) for count in counts]


def test_groups_have_scores_and_cells_without_one_their_count(root, metrics):
    part = section(root, "Subgroups")
    assert [heading.text for heading in part.iter("h3")] == ["By sex", "By age", "By view"]
    groups = metrics["subgroups"]["age"]["groups"]
    rows = rows_of(part, "By age: AUROC")
    cells = dict(zip(groups, rows["Edema"]))
    assert any(each["Edema"]["auroc"] is None for each in groups.values())
    for group, each in groups.items():
        score, positives = each["Edema"]["auroc"], f"{each['Edema']['positives']} positive"
        assert cells[group].endswith(positives)
        assert cells[group].startswith("-" if score is None else f"{score['value']:.3f} ")
    gap = metrics["subgroups"]["view"]["gaps"]["Mass"]["auroc"]
    assert rows_of(part, "By view: AUROC")["Mass"][2].startswith(f"{gap['value']:.3f}")


def test_clear_gaps_are_bold(root, metrics):
    clear = [cell for cell in root.iter("td") if cell.get("class") == "clear"]
    expected = [
        gap
        for part in metrics["subgroups"].values()
        for name, scores in part["gaps"].items()
        for gap in scores.values()
        if name != "macro" and gap is not None and gap["low"] > 0
    ]
    assert len(clear) == len(expected) > 0


def test_figures_have_titles_and_descriptions(root):
    figures = [figure for figure in root.iter("svg") if figure.get("role") == "img"]
    assert len(figures) > 30
    assert all(figure.findtext("title") for figure in figures)
    drawn = [title.text for title in root.iter("title")]
    for kind in ("ROC", "precision and recall", "reliability"):
        assert f"Mass: {kind}" in drawn
    assert "Hernia: ROC" not in drawn, "undefined"


def test_what_is_absent_is_left_out(metrics, predictions):
    given = {key: value for key, value in metrics.items() if key not in OPTIONAL_KEYS}
    page = written(given, predictions)
    assert page == written({**given, **dict.fromkeys(OPTIONAL_KEYS)}, predictions)
    root = ElementTree.fromstring(page)
    for heading in ("Operating points", "Calibration", "Subgroups", "Radiologists' labels"):
        assert section(root, heading) is None
    assert section(root, "ROC curves") is not None


def test_parts_of_a_calibration_may_be_absent(metrics, predictions):
    calibration = dict.fromkeys(NAMES)
    calibration["Mass"] = {**metrics["calibration"]["Mass"], "platt": None, "platt_scaled": None}
    given = {**metrics, "calibration": calibration}
    root = ElementTree.fromstring(written(given, predictions))
    row = rows_of(section(root, "Calibration"), "Errors")["Mass"]
    assert row[:3] == ["1.200", "-", "-"] and row.count("-") == 5


def test_page_of_undefined_scores_is_written(predictions):
    nothing = predictions.take(np.arange(20))
    nothing.labels[:] = -1
    page = written(example_metrics(nothing, count=2), nothing, context(picture))
    root = ElementTree.fromstring(page)
    assert "No AUROC is defined" in page
    assert section(root, "ROC curves") is None


def test_origin_versions_and_configuration_are_shown(root, metrics):
    part = section(root, "Model and data")
    facts = {row[0].text: "".join(row[1].itertext()) for row in part.iter("tr")}
    assert facts["csv_sha256"] == metrics["csv_sha256"]
    assert (facts["step"], facts["torch"]) == ("1200", "2.13.0")
    assert part.findtext("details/pre") == context().config_text
    assert not {"auroc", "findings", "notice"} & set(facts)


# The images


def figures_of(root, name):
    part = section(root, "Best and worst cases")
    (found,) = (
        each
        for each in part.iter("div")
        if each.find("h3") is not None and "".join(each.find("h3").itertext()) == name
    )
    return list(found.iter("figure"))


def test_unknown_configuration_is_left_out(predictions, metrics):
    page = written(metrics, predictions, PageContext("title", "", {}))
    assert "Configuration" not in page and "<pre>" not in page


def test_best_and_worst_cases_are_shown(root, predictions):
    column = NAMES.index("Mass")
    labels, scores = predictions.labels[:, column], predictions.probabilities[:, column]
    expected = [
        max(np.flatnonzero(labels == 1), key=lambda row: scores[row]),
        max(np.flatnonzero(labels == 0), key=lambda row: scores[row]),
        min(np.flatnonzero(labels == 1), key=lambda row: scores[row]),
    ]
    texts = ["".join(figure.itertext()) for figure in figures_of(root, "Mass")]
    assert len(texts) == 3
    for row, text in zip(expected, texts):
        record = predictions.table.iloc[row]
        assert text.startswith(f"{scores[row]:.3f} ")
        assert record["image"] in text and f"{record['age']:.0f} years" in text
    assert len(figures_of(root, "Hernia")) == 1, "no image has it"


def test_thumbnails_are_small_pictures(root):
    """Also those with maps, which are JPEG, as they would take five times the space."""
    images = [image.get("src") for image in root.iter("img")]
    assert len(images) > 5
    for image in images:
        kind, _, data = image.partition(",")
        assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 192


def test_maps_are_below_their_images(root):
    for name, kinds in (("Mass", ["png", "jpeg"]), ("Nodule", ["png"])):
        figure = next(each for each in figures_of(root, name) if each.find("img") is not None)
        found = [image.get("src")[len("data:image/") :] for image in figure.iter("img")]
        assert [each.partition(";")[0] for each in found] == kinds
    texts = [text.text for text in section(root, "Best and worst cases").iter("p")]
    assert "Below is <i>a map</i>." in texts


def test_image_that_cannot_be_shown_is_named(predictions, metrics):
    page = written(metrics, predictions, context(lambda name: None))
    assert "<img" not in page and "data:image" not in page and "a map" not in page
    assert len(figures_of(ElementTree.fromstring(page), "Mass")) == 3


def test_without_images_no_patient_is_named(predictions, metrics):
    page = written(metrics, predictions)
    assert "names and shows no image" in page
    assert not [name for name in predictions.table["image"] if name in page]
    assert "<img" not in page


# The file


def test_page_is_self_contained_and_its_policy_knows_its_style_and_script(path):
    text = path.read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{digest}&#39;" in policy
    assert policy.startswith("default-src &#39;none&#39;; img-src data:;")
    assert not re.search(r"https?://| style=| on\w+=\"|<link|@import|url\(", text)


def test_names_are_escaped(path, root):
    text = path.read_text(encoding="utf-8")
    assert text.count("<script>") == 1 and "<img src=x" not in text and "<b>&" not in text
    assert "\u202e" not in text and "\\u202e&lt;img src=x" in text
    assert HOSTILE in [name.text for name in root.iter("bdi")]
    assert "&lt;i&gt;" in text and "<i>" not in text


def test_page_of_14_findings_is_small():
    predictions = random_predictions(FINDINGS, images=5000)
    page = written(example_metrics(predictions, count=2), predictions)
    assert 100_000 < len(page.encode()) < 500_000


def test_of_many_labels_the_most_frequent_are_drawn():
    predictions = random_predictions([f"finding {number}" for number in range(45)], images=200)
    metrics = example_metrics(predictions, count=2)
    root = ElementTree.fromstring(written(metrics, predictions))
    assert len(list(section(root, "ROC curves").iter("figure"))) == 40
    assert len(rows_of(section(root, "Scores by finding"), "Scores")) == 1 + 45 + 3


# In a browser


@pytest.fixture
def opened(browser, path):
    browser.open(path)
    return browser


def column(browser, number):
    """Return the sort keys of a column of the first table."""
    return browser.evaluate(
        "Array.from(document.querySelector('table.sortable').tBodies[0].rows,"
        f" row => row.cells[{number}].dataset.value)"
    )


def sorted_by(browser):
    return browser.evaluate(
        "Array.from(document.querySelectorAll('[aria-sort]'),"
        " head => [head.textContent, head.getAttribute('aria-sort')])"
    )


def test_browser_reports_no_problem_and_asks_for_nothing(opened, path):
    opened.click("th:nth-child(2) span")
    assert opened.problems == []
    others = [url for url in opened.requests if not url.startswith("data:image/")]
    assert others == [path.as_uri()]
    assert opened.evaluate("document.querySelectorAll('script').length") == 1


def test_click_on_a_heading_sorts_and_undefined_scores_stay_last(opened):
    assert sorted_by(opened) == []
    *defined, undefined = sorted(column(opened, 1), key=lambda value: -float(value or -1))
    assert undefined == ""
    opened.click("th:nth-child(2) span")
    assert column(opened, 1) == [*defined, ""]
    assert sorted_by(opened) == [["AUROC", "descending"]]
    opened.click("th:nth-child(2) span")
    assert column(opened, 1) == [*defined[::-1], ""]
    assert sorted_by(opened) == [["AUROC", "ascending"]]
    opened.click("th:nth-child(1) span")
    assert sorted(column(opened, 0), key=str.lower) == column(opened, 0)
    assert sorted_by(opened) == [["finding", "ascending"]]


def test_keyboard_sorts(opened):
    opened.press_enter("th:nth-child(6) span")
    positives = column(opened, 5)
    assert positives == sorted(positives, key=lambda value: -int(value))
    assert sorted_by(opened) == [["positives", "descending"]]
    focused = "document.activeElement.textContent"
    assert opened.evaluate(focused) == "positives"


@pytest.mark.parametrize("width", [320, 400, 1400])
def test_nothing_is_wider_than_the_window(browser, path, width):
    browser.open(path, width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("window.innerWidth") == width


def test_answers_are_on_the_first_screen(opened):
    bottom = "document.querySelector('.answers').getBoundingClientRect().bottom"
    assert opened.evaluate(bottom) < 900


def test_figures_are_large_enough_to_read_on_a_phone(browser, path):
    browser.open(path, 400)
    sizes = browser.evaluate(
        "Array.from(document.querySelectorAll('.small text'),"
        " text => 9 * text.ownerSVGElement.getBoundingClientRect().width / 125)"
    )
    assert min(sizes) > 10, "pixels"


def test_long_names_do_not_widen_the_page(browser, tmp_path):
    predictions = random_predictions(["W" * 100, "finding " * 12], images=100)
    predictions.table["view"] = np.where(np.arange(100) % 2, "V" * 200, "PA")
    predictions.table["image"] = [f"{'i' * 240}{row}.png" for row in range(100)]
    metrics = {**example_metrics(predictions, count=2), "checkpoint": "/" + "c" * 400}
    page = written(metrics, predictions, context(lambda name: None))
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    for width in (400, 1400):
        browser.open(tmp_path / "page.html", width)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width


def luminance(colour):
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_curves_stand_out_from_the_background(browser, path, dark):
    """WCAG 2.1 asks for a contrast of 4.5 of texts and 3 of graphics."""
    browser.open(path, dark=dark)
    style = "getComputedStyle(document.querySelector('{}')).{}"
    behind = luminance(browser.evaluate(style.format("body", "backgroundColor")))
    assert (behind < 0.1) == dark
    for selector, attribute, least in (
        ("body", "color", 4.5),
        ("small", "color", 4.5),
        ("svg text", "fill", 4.5),
        (".curve", "stroke", 3),
        (".before", "stroke", 3),
        (".platt_scaled", "stroke", 3),
    ):
        front = luminance(browser.evaluate(style.format(selector, attribute)))
        contrast = (max(front, behind) + 0.05) / (min(front, behind) + 0.05)
        assert contrast >= least, selector


def test_page_can_be_printed(opened):
    pdf = opened.pdf()
    assert pdf.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 3
