import socket

import pytest
from example_metrics import example_metrics, random_predictions
from huggingface_hub import ModelCard

from cxr_vit.evaluation.model_card import model_card
from cxr_vit.evaluation.page import PageContext

HOSTILE = "<script>alert(1)</script> [a](b) `c` | d"
CONTEXT = PageContext("runs/demo, test", "run: {name: demo}\n```\nseed: 0\n", {"torch": "2.13.0"})


@pytest.fixture
def metrics():
    return example_metrics(random_predictions(["Mass", "Nodule", "Edema", HOSTILE]), count=5)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model card asks nothing")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_metadata_have_every_score(metrics):
    card = ModelCard(model_card(metrics, CONTEXT))
    found = {
        (result.metric_type, result.metric_name.partition(", ")[2]): result.metric_value
        for result in card.data.eval_results
    }
    expected = {}
    for kind, score in (("roc_auc", "auroc"), ("average_precision", "average_precision")):
        expected[kind, "macro"] = metrics["means"]["macro"][score]["value"]
        for name, each in metrics["findings"].items():
            expected[kind, name] = each[score]["value"]
    assert found == expected
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert card.data.model_name == "runs/demo, test"


def test_undefined_scores_are_left_out_of_the_metadata_and_named_in_the_text(metrics):
    metrics["findings"]["Mass"].update(auroc=None, average_precision=None, positives=0)
    text = model_card(metrics, CONTEXT)
    assert not [r for r in ModelCard(text).data.eval_results if r.metric_name.endswith("Mass")]
    assert "no image is known to be positive: Mass." in text
    assert "| Mass | 0 |" in text


def test_text_says_what_the_model_is_for_and_what_not(metrics):
    text = ModelCard(model_card(metrics, CONTEXT)).text
    assert text.count(metrics["notice"]) == 2
    for words in ("## Intended use", "Not intended: diagnosis", "## Limits", "## Where not?"):
        assert words in text
    assert metrics["csv_sha256"] in text and "2.13.0" in text


def test_table_has_scores_with_intervals(metrics):
    text = model_card(metrics, CONTEXT)
    each = metrics["findings"]["Nodule"]
    auroc = "{value:.3f} ({low:.3f} to {high:.3f})".format(**each["auroc"])
    row = next(line for line in text.splitlines() if line.startswith("| Nodule |"))
    assert f"| {auroc} |" in row and f"| {each['positives']} |" in row


def test_names_are_shown_as_they_are(metrics):
    text = ModelCard(model_card(metrics, CONTEXT)).text
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if "script" in line and line.startswith("|")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 7, "six columns"
    assert "\\[a\\](b)" in rows[0] and "\\`c\\`" in rows[0]


def test_configuration_cannot_end_its_block(metrics):
    lines = model_card(metrics, CONTEXT).splitlines()
    start = lines.index("````yaml")
    assert lines[start + 1 : start + 5] == ["run: {name: demo}", "```", "seed: 0", "````"]


def test_sections_may_be_absent(metrics):
    for key in ("calibration", "operating_points", "subgroups", "relabels"):
        del metrics[key]
    assert "no group is scored" in model_card(metrics, CONTEXT)


def test_no_image_and_no_patient_is_named(metrics):
    predictions = random_predictions(["Mass"])
    text = model_card(metrics, CONTEXT)
    assert not [name for name in predictions.table["image"] if name in text]
