import math

import pytest
import torch

from cxr_vit.model.loss import multi_label_loss


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
