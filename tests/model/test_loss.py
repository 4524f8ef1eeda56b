import math

import numpy as np
import pytest
import torch

from cxr_vit.config.schema import LossSection
from cxr_vit.model.loss import multi_label_loss, positive_weight


def test_loss_is_the_mean_over_samples_and_labels():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 0.5]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    terms = [math.log(1 + math.exp(-value)) for value in (0.0, -2.0, 1.0, 0.5)]
    assert float(multi_label_loss(logits, labels)) == pytest.approx(sum(terms) / 4, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_logits_is_computed_in_fp32(dtype):
    logits = torch.tensor([[60.0, -60.0]], dtype=dtype)
    loss = multi_label_loss(logits, torch.tensor([[0.0, 1.0]]))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(60.0)


def test_mean_over_micro_batches_is_the_mean_over_the_batch():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 14), (torch.rand(8, 14) < 0.2).float()
    parts = [multi_label_loss(a, b) for a, b in zip(logits.split(2), labels.split(2))]
    assert float(torch.stack(parts).mean()) == pytest.approx(
        float(multi_label_loss(logits, labels))
    )


# Unknown labels


def test_unknown_labels_add_nothing_and_leave_the_divisor():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 0.5]], requires_grad=True)
    labels = torch.tensor([[1.0, -1.0], [0.0, -1.0]])
    loss = multi_label_loss(logits, labels, has_unknown=True)
    loss.backward()
    assert loss.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(-1.0))) / 4, rel=1e-6)
    assert logits.grad.tolist() == [[pytest.approx(-0.5 / 4), 0], [pytest.approx(0.2689414 / 4), 0]]


def test_mask_of_known_labels_changes_no_bit():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 14), (torch.rand(8, 14) < 0.2).float()
    loss = multi_label_loss(logits, labels, has_unknown=True)
    assert torch.equal(loss, multi_label_loss(logits, labels))


# Each loss against its formula


def section(name, **settings):
    return LossSection(name=name, **settings)


LOSSES = [
    section("bce"),
    section("weighted_bce"),
    section("focal"),
    section("focal", gamma=1.5),
    section("asymmetric"),
    section("asymmetric", negative_gamma=2.0, positive_gamma=0.0, clip=0.2),
    section("asymmetric", negative_gamma=0.0, positive_gamma=1.0, clip=0.0),
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
WEIGHT = torch.tensor([3.0, 20.0])


def formula(z, y, weight, loss):
    """Return the loss of one label, as in the papers."""
    p = 1 / (1 + math.exp(-z))
    if loss.name == "focal":  # equation 4 of Lin et al., 2017
        p_t = p if y else 1 - p
        return -((1 - p_t) ** loss.gamma) * math.log(p_t)
    if loss.name == "asymmetric":  # equations 5 to 7 of Ridnik et al., 2021
        p_m = max(p - loss.clip, 0)
        if y:
            return -((1 - p) ** loss.positive_gamma) * math.log(p)
        return -(p_m**loss.negative_gamma) * math.log(1 - p_m)
    factor = weight if loss.name == "weighted_bce" else 1.0
    return -factor * math.log(p) if y else -math.log(1 - p)


def computed(logits, labels, loss, **more):
    weight = WEIGHT if loss.name == "weighted_bce" else None
    return multi_label_loss(logits, labels, loss, positive_weight=weight, **more)


@each_loss
@pytest.mark.parametrize("has_unknown", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(loss, has_unknown):
    values = [-6.0, -2.95, -1.0, 0.0, 0.7, 4.0]
    logits = torch.tensor([[value, -value] for value in values], requires_grad=True)
    labels = torch.tensor([[float(row % 2), float(row % 3 == 0)] for row in range(len(values))])
    if has_unknown:
        labels[1, 0] = labels[4, 1] = -1.0
    result = computed(logits, labels, loss, has_unknown=has_unknown)
    result.backward()
    terms, slopes, step = 0.0, [], 1e-6
    for z, y, weight in zip(
        logits.flatten().tolist(), labels.flatten().tolist(), WEIGHT.tolist() * len(values)
    ):
        known = y >= 0
        terms += formula(z, y, weight, loss) if known else 0.0
        ends = [formula(z + sign * step, y, weight, loss) for sign in (1, -1)]
        slopes.append((ends[0] - ends[1]) / (2 * step) if known else 0.0)
    assert result.item() == pytest.approx(terms / 12, rel=1e-5)
    expected = torch.tensor(slopes).view(-1, 2) / 12
    assert torch.allclose(logits.grad, expected, rtol=1e-4, atol=1e-7)


def both(logits, labels, *losses):
    """Return loss and gradients of each."""
    for loss in losses:
        leaf = logits.clone().requires_grad_()
        result = multi_label_loss(leaf, labels, loss, has_unknown=True)
        result.backward()
        yield result.detach(), leaf.grad


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (section("asymmetric", negative_gamma=0, positive_gamma=0, clip=0), section("bce")),
        (section("focal", gamma=0), section("bce")),
        (section("asymmetric", negative_gamma=2, positive_gamma=2, clip=0), section("focal")),
    ],
)
def test_losses_without_what_distinguishes_them_are_equal(one, other):
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(8, 14), torch.randint(-1, 2, (8, 14)).float()
    (first, slope), (second, expected) = both(logits, labels, one, other)
    assert torch.allclose(first, second, rtol=0, atol=1e-6)
    assert torch.allclose(slope, expected, rtol=0, atol=1e-6)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_logits_have_finite_losses_and_gradients(loss, dtype):
    logits = torch.tensor([[-100.0, 100.0]] * 3, dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    result = computed(logits, labels, loss, has_unknown=True)
    result.backward()
    assert result.dtype == torch.float32
    assert 1 < result.item() < 1000
    assert torch.isfinite(logits.grad).all()
    assert torch.equal(logits.grad[2], torch.zeros(2, dtype=dtype))


def test_weights_of_positives_are_negatives_per_positive_with_a_limit():
    prevalence = np.array([0.5, 0.2, 0.01])
    weight = positive_weight(prevalence, section("weighted_bce"))
    assert weight.tolist() == [1.0, 4.0, 20.0]
    higher = positive_weight(prevalence, section("weighted_bce", max_positive_weight=99))
    assert higher.tolist() == [1.0, 4.0, 99.0]
