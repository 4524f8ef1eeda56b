import warnings

import numpy as np
import pytest
import torch
from torchmetrics.classification import MultilabelAUROC, MultilabelAveragePrecision

from cxr_vit.data.labels import FINDINGS, nih_names
from cxr_vit.errors import NonFiniteLoss
from cxr_vit.evaluation.metrics import evaluate, flat_scores, probabilities


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 14, generator=generator)
    labels = (torch.rand(200, 14, generator=generator) < 0.3).float()
    return logits, labels


def pairwise_auroc(scores, truth):
    """Compute AUROC from its definition: the share of correctly ordered pairs, ties count half."""
    positive, negative = scores[truth == 1], scores[truth == 0]
    difference = positive[:, None] - negative[None]
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def test_auroc_is_the_share_of_correctly_ordered_pairs(scored):
    logits, labels = scored
    auroc = evaluate(logits, labels, FINDINGS)["auroc"]
    for column, name in enumerate(FINDINGS):
        assert auroc[name] == pytest.approx(
            pairwise_auroc(logits[:, column], labels[:, column]), abs=1e-5
        )


def test_ties_count_half():
    logits, labels = torch.zeros(6, 1), torch.tensor([[1.0], [0.0], [0.0], [1.0], [0.0], [0.0]])
    assert evaluate(logits, labels, ["Mass"])["auroc"]["Mass"] == 0.5


def test_defined_scores_equal_torchmetrics(scored):
    logits, labels = scored
    scores = evaluate(logits, labels, FINDINGS)
    probs, truth = torch.sigmoid(logits), labels.long()
    assert scores["auroc_macro"] == pytest.approx(float(MultilabelAUROC(14)(probs, truth)))
    precision = MultilabelAveragePrecision(14)(probs, truth)
    assert scores["average_precision_macro"] == pytest.approx(float(precision))
    assert (scores["auroc_defined"], scores["num_findings"]) == (14, 14)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_finding_without_positives_or_negatives_is_undefined(scored, value):
    logits, labels = scored
    full = evaluate(logits, labels, FINDINGS)
    labels[:, 13] = value
    scores = evaluate(logits, labels, FINDINGS)
    assert scores["auroc"]["Hernia"] is None
    assert scores["average_precision"]["Hernia"] is None
    assert scores["auroc_defined"] == 13
    expected = [full["auroc"][name] for name in FINDINGS[:13]]
    assert scores["auroc_macro"] == pytest.approx(sum(expected) / 13)


def test_torchmetrics_includes_a_zero_in_its_mean(scored):
    logits, labels = scored
    labels[:, 13] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MultilabelAUROC(14, average=None)(torch.sigmoid(logits), labels.long())
    assert float(theirs[13]) == 0.0, "if torchmetrics changes this, our own rule is not needed"


def test_mean_of_undefined_scores_is_undefined():
    scores = evaluate(torch.randn(4, 2), torch.zeros(4, 2), ["Mass", "Nodule"])
    assert scores["auroc_macro"] is None
    assert scores["auroc_defined"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_are_refused(scored, bad):
    logits, labels = scored
    logits[3, 5] = bad
    with pytest.raises(NonFiniteLoss, match="not finite for 1 of 200 images"):
        evaluate(logits, labels, FINDINGS)


def test_no_finding_is_not_part_of_the_mean_of_the_findings(scored):
    logits, labels = scored
    names = nih_names(include_no_finding=True)
    healthy = (labels.sum(1) == 0).float()
    healthy[:50] = 1.0
    with_healthy = evaluate(
        torch.cat([logits, -100 * healthy[:, None]], 1),
        torch.cat([labels, healthy[:, None]], 1),
        names,
    )
    plain = evaluate(logits, labels, FINDINGS)
    assert with_healthy["auroc"]["No Finding"] == 0.0
    assert with_healthy["auroc_macro"] == plain["auroc_macro"]
    assert with_healthy["auroc_macro_with_no_finding"] == pytest.approx(
        plain["auroc_macro"] * 14 / 15
    )


def test_score_of_a_finding_does_not_depend_on_the_others(scored):
    logits, labels = scored
    before = evaluate(logits, labels, FINDINGS)["auroc"]["Mass"]
    logits[:, 0] += 50 * torch.rand(200)  # a softmax would change every other finding's score
    assert evaluate(logits, labels, FINDINGS)["auroc"]["Mass"] == before


def test_probabilities_are_fp32_sigmoids():
    probs = probabilities(torch.tensor([[0.0, 3.0]], dtype=torch.bfloat16))
    assert probs.dtype == torch.float32
    assert probs.tolist()[0] == pytest.approx([0.5, 0.9525741])


def test_flat_scores_have_the_tags_of_the_logs(scored):
    logits, labels = scored
    labels[:, 13] = 0
    flat = flat_scores(logits, labels, FINDINGS)
    assert flat["auroc/Hernia"] is None
    assert 0.3 < flat["auroc/Mass"] < 0.7
    assert flat["auroc_defined"] == 13
    assert {"auroc_macro", "average_precision_macro", "average_precision/Mass"} <= set(flat)
    assert not any(isinstance(value, (dict, str)) for value in flat.values())


# Unknown labels


@pytest.fixture
def partly_known():
    """60 images with four labels, of which 0, 5, 31 and 58 are unknown."""
    random = np.random.RandomState(0)
    logits = random.randn(60, 4).astype(np.float32)
    labels = (random.rand(60, 4) < 0.4).astype(np.float32)
    labels[random.rand(60, 4) < np.array([0.0, 0.1, 0.5, 0.9])] = -1
    labels[labels[:, 3] == 0, 3] = -1
    return torch.from_numpy(logits), torch.from_numpy(labels)


def test_unknown_labels_leave_an_image_out_of_the_scores_of_one_finding(partly_known):
    names = ["Mass", "Nodule", "Edema", "no_finding"]
    scores = evaluate(*partly_known, names)
    # roc_auc_score and average_precision_score of scikit-learn 1.9.1 on the known entries.
    expected = {"Mass": 0.5279017857142858, "Nodule": 0.6129032258064516, "Edema": 0.69607843137254}
    precision = {"Mass": 0.51135017575880, "Nodule": 0.52133478549750, "Edema": 0.5902487759824716}
    for name in names[:3]:
        assert scores["auroc"][name] == pytest.approx(expected[name], abs=1e-6)
        assert scores["average_precision"][name] == pytest.approx(precision[name], abs=1e-6)
    assert scores["auroc"]["no_finding"] is None, "no image is known to be negative"
    assert scores["positives"] == {"Mass": 28, "Nodule": 24, "Edema": 12, "no_finding": 2}
    assert scores["unknown"] == {"Mass": 0, "Nodule": 5, "Edema": 31, "no_finding": 58}
    assert (scores["num_samples"], scores["auroc_defined"], scores["num_findings"]) == (60, 3, 3)
    assert scores["auroc_macro"] == pytest.approx(sum(expected.values()) / 3)
    assert "unknown" not in flat_scores(*partly_known, names)


def test_finding_without_known_labels_is_undefined(partly_known):
    logits, labels = partly_known
    labels[:, 1] = -1
    scores = evaluate(logits, labels, list("abcd"))
    assert scores["auroc"]["b"] is scores["average_precision"]["b"] is None
    assert (scores["positives"]["b"], scores["unknown"]["b"]) == (0, 60)


def test_number_of_unknown_labels_is_left_out_if_there_are_none(scored):
    assert "unknown" not in evaluate(*scored, FINDINGS)
