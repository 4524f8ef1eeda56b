"""The figures of a split: their content, and text that TensorBoard's card leaves legible."""

from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.data.labels import FINDINGS
from cxr_vit.evaluation.figures import image_grid, roc_figure, roc_overview
from cxr_vit.evaluation.metrics import evaluate


@pytest.fixture
def dataset(make_config):
    return ChestXrayDataModule(make_config()).dataset("test")


def scored(names, num_samples=50):
    random = torch.Generator().manual_seed(0)
    labels = (torch.rand((num_samples, len(names)), generator=random) < 0.3).float()
    return torch.randn(labels.shape, generator=random) + labels, labels


def assert_legible(figure):
    """Check that no text is small, beyond the edge or over another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes_off = [axes for axes in figure.axes if not axes.axison]
    hidden = {text for axes in axes_off for text in axes.xaxis.findobj(Text)}
    hidden |= {text for axes in axes_off for text in axes.yaxis.findobj(Text)}
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist not in hidden)
    shown = [text for text in found if text.get_text().strip()]
    assert shown
    assert min(text.get_fontsize() for text in shown) >= 7.5
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
    for text, box in boxes:
        assert box.x0 >= -1 and box.x1 <= renderer.width + 1, text
        assert box.y0 >= -1 and box.y1 <= renderer.height + 1, text
    for (one, box), (other, place) in combinations(boxes, 2):
        across = min(box.x1, place.x1) - max(box.x0, place.x0)
        down = min(box.y1, place.y1) - max(box.y0, place.y0)
        assert across <= 1 or down <= 2, f"{one!r} overlaps {other!r}"


def test_heading_of_an_undefined_curve_is_undefined():
    labels = torch.zeros(4, 2)
    labels[0, 0] = 1
    figure = roc_figure(torch.randn(4, 2), labels, ["Mass", "Hernia"], title="title")
    titles = [axis.get_title() for axis in figure.axes[:2]]
    assert "undefined" in titles[1]
    assert "undefined" not in titles[0]


@pytest.mark.parametrize("draw", [roc_figure, roc_overview])
def test_curve_has_the_images_whose_label_is_known(draw):
    logits, labels = scored(["Mass", "Hernia"])
    known = draw(logits[:25], labels[:25], ["Mass", "Hernia"])
    labels[25:] = -1
    for line, expected in zip(
        draw(logits, labels, ["Mass", "Hernia"]).axes[0].lines[1:], known.axes[0].lines[1:]
    ):
        assert line.get_xydata().tolist() == expected.get_xydata().tolist()
        assert len(expected.get_xydata()) > 5


# roc_overview


def test_overview_lists_the_labels_by_their_auroc():
    logits, labels = scored(FINDINGS)
    (legend,) = roc_overview(logits, labels, FINDINGS).legends
    scores = evaluate(logits, labels, FINDINGS)
    by_score = sorted(FINDINGS, key=lambda name: -scores["auroc"][name])
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [f"{scores['auroc'][name]:.2f} {name}" for name in by_score]
    assert legend.get_title().get_text() == f"macro AUROC {scores['auroc_macro']:.3f}"


def test_overview_draws_each_defined_curve():
    logits, labels = scored(FINDINGS)
    labels[:, 3] = 0
    (axis,) = roc_overview(logits, labels, FINDINGS).axes
    names = {line.get_label().split(" ", 1)[1] for line in axis.lines if "." in line.get_label()}
    assert names == set(FINDINGS) - {FINDINGS[3]}


def test_overview_without_a_defined_curve_says_so():
    figure = roc_overview(torch.randn(4, 2), torch.zeros(4, 2), ["Mass", "Hernia"])
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "AUROC undefined"
    assert_legible(figure)


@pytest.mark.parametrize(
    "names",
    [
        FINDINGS,
        (*FINDINGS, "No Finding"),
        [f"L{i}" for i in range(30)],
        ["Enlarged Cardiomediastinum", "a name of one hundred characters " * 3],
    ],
)
def test_overview_is_legible_in_a_card(names):
    assert_legible(roc_overview(*scored(names), names))


# image_grid


def test_image_grid_has_the_findings_of_each_image(dataset):
    figure = image_grid(dataset, FINDINGS, num_images=len(dataset))
    titles = sorted(axis.get_title() for axis in figure.axes if axis.images)
    expected = []
    for text in dataset.records.table["findings"]:
        found = [name for name in FINDINGS if name in text.split("|")]
        if len(found) > 2:
            found = [found[0], f"and {len(found) - 1} more"]
        expected.append("\n".join(found) or "No Finding")
    assert titles == sorted(expected)
    assert any("more" in title for title in titles)


def test_image_grid_tells_unknown_from_absent(dataset):
    dataset.records.labels[:] = -1
    dataset.records.labels[0] = 0
    dataset.records.labels[1, 4] = 1
    rows = ChestXrayDataset(dataset.records, dataset._reader)
    figure = image_grid(rows, FINDINGS, num_images=len(rows))
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert sorted(set(titles)) == ["Mass", "No Finding", "none known"]
    assert (titles.count("No Finding"), titles.count("Mass")) == (1, 1)


def test_image_grid_is_legible_in_a_card(dataset):
    dataset.records.labels[:] = 0
    dataset.records.labels[:, -2:] = 1  # Pleural_Thickening, the longest name
    names = [*FINDINGS[:-2], "Pleural_Thickening", "Enlarged Cardiomediastinum"]
    figure = image_grid(dataset, names)
    assert figure.get_figwidth() == 4
    assert 2 <= figure.get_figheight() <= 3
    assert_legible(figure)


@pytest.mark.parametrize("draw", [roc_figure, roc_overview])
def test_names_are_no_formulas(draw):
    names = ["Dose $\\mGy$", "$\\bad$"]
    figure = draw(*scored(names), names)
    FigureCanvasAgg(figure).draw()
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any("Dose $\\mGy$" in text for text in texts)


def test_findings_of_the_grid_are_no_formulas(dataset):
    names = ["$\\bad$"] * len(FINDINGS)
    dataset.records.labels[:] = 1
    FigureCanvasAgg(image_grid(dataset, names)).draw()


def test_of_many_labels_the_most_frequent_are_drawn():
    names = [f"finding {number}" for number in range(45)]
    logits, labels = scored(names)
    labels[:, [3, 8, 20, 30, 44]] = 0
    shown = [name for name, count in zip(names, labels.sum(dim=0)) if count]
    figure = roc_figure(logits, labels, names, title="ROC")
    assert figure._suptitle.get_text() == "ROC; the 40 most frequent of 45 labels"
    assert [axis.get_title().partition("\n")[0] for axis in figure.axes] == shown
    overview = roc_overview(logits, labels, names)
    assert len(overview.axes[0].lines) == 1 + 40
    (legend,) = overview.legends
    macro = evaluate(logits, labels, names)["auroc_macro"]
    assert legend.get_title().get_text() == f"macro AUROC {macro:.3f}\n40 most frequent of 45"
    assert_legible(overview)
