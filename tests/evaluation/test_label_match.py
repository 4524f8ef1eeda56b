"""Labels of a data set and of a model that was trained on another one."""

import pytest
import torch

from cxr_vit.data.labels import FINDINGS
from cxr_vit.errors import ConfigError
from cxr_vit.evaluation.label_match import match_labels

GOOGLE = ["Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass"]
OPACITIES = ["Consolidation", "Infiltration", "Pneumonia", "Edema"]
MAP = {"Airspace opacity": OPACITIES, "Nodule or mass": ["Mass", "Nodule"]}


def matched(data, model, label_map=None):
    """Return data label -> labels of the model."""
    return match_labels(data, model, label_map or {}).facts()["label_map"]


def test_highest_logit_of_several_counts():
    match = match_labels(GOOGLE, FINDINGS, MAP)
    assert match.names == GOOGLE[1:]
    logits = torch.randn(5, 14, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, -1, 0, 1]])
    selected, known = match.select(logits, labels)
    assert torch.equal(known, labels[:, 1:])
    column = FINDINGS.index
    assert torch.equal(selected[:, 0], logits[:, column("Pneumothorax")])
    opacities = logits[:, [column(name) for name in OPACITIES]]
    assert selected[:, 1].tolist() == [max(row) for row in opacities.tolist()]
    assert selected.shape == (5, 3)


def test_labels_without_a_counterpart_are_named():
    match = match_labels(GOOGLE, ["Mass", "Pneumothorax", "Hernia"], MAP)
    without = match.facts()["labels_without_counterpart"]
    assert without == {"data": ["Fracture", "Airspace opacity"], "model": ["Hernia"]}
    assert "\n".join(match.describe()).splitlines() == [
        "scored labels: 2 of the data's 4",
        "compared: Nodule or mass with Mass",
        "labels of the data without a counterpart in the model: Fracture, Airspace opacity",
        "labels of the model without one in the data: Hernia",
    ]


def test_case_blanks_and_underscores_do_not_matter():
    data = ["pleural thickening", "No_Finding", "EDEMA"]
    model = ["Edema", "Pleural_Thickening", "No Finding"]
    assert list(matched(data, model).values()) == [[model[1]], [model[2]], [model[0]]]


def test_same_labels_need_no_map_and_other_orders_are_sorted():
    names = list(FINDINGS)
    logits = torch.randn(3, 14)
    match = match_labels(names, FINDINGS, {"Mass": ["Lung Lesion", "Nodule"]})
    assert match.is_identity and match.describe() == [], "the name wins over a part of the map"
    assert match.select(logits, logits)[0] is logits
    match = match_labels(names[::-1], FINDINGS, {})
    assert not match.is_identity
    assert torch.equal(match.select(logits, logits)[0], logits.flip(1))


def test_a_map_counts_where_the_labels_are_the_same():
    match = match_labels(FINDINGS, FINDINGS, {"Mass": "Nodule"})
    assert not match.is_identity
    mass, nodule = FINDINGS.index("Mass"), FINDINGS.index("Nodule")
    logits = torch.randn(3, 14)
    selected, labels = match.select(logits, logits)
    assert torch.equal(selected[:, mass], logits[:, nodule]) and torch.equal(labels, logits)
    assert "compared: Mass with Nodule" in match.describe()
    with pytest.raises(ConfigError, match="no label 'Tube'"):
        match_labels(FINDINGS, FINDINGS, {"Tube": "Mass"})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (["Lung Opacity", *OPACITIES], OPACITIES),
        (["Lung Opacity", "Edema"], ["Lung Opacity"]),
        (["Pneumonia", "Mass", "Edema"], ["Pneumonia", "Edema"]),
    ],
)
def test_whole_map_wins_over_the_name_which_wins_over_a_part_of_the_map(model, expected):
    """A data set's map is for a model of NIH's labels, but may be used with its own model."""
    assert matched(["Lung Opacity"], model, {"lung_opacity": OPACITIES}) == {
        "Lung Opacity": expected
    }


def test_no_label_in_common_lists_both():
    with pytest.raises(ConfigError) as raised:
        match_labels(["fracture", "tube"], ["Mass", "Edema"], {})
    text = str(raised.value)
    assert "the data have fracture, tube, the model has Mass, Edema." in text
    assert "data.label_map={fracture: Mass}" in text
    assert "\n" not in text


def test_map_of_a_label_that_the_data_lack_is_refused():
    with pytest.raises(ConfigError, match=r"no label 'Airspace opacty'. Did you mean 'Airspace op"):
        match_labels(GOOGLE, FINDINGS, {"Airspace opacty": "Edema"})
