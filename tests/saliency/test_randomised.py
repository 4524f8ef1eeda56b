"""Weights that are randomised from the head to the embedding."""

from __future__ import annotations

import pytest
import torch

from cxr_vit.config import StagePlan
from cxr_vit.model.stages import StagedViT
from cxr_vit.saliency.randomised import cascade
from families import make


@pytest.mark.parametrize(("kind", "layers"), [("vit", [1, 1]), ("dinov2", [2])])
def test_parts_are_permuted_one_after_the_other_in_a_copy(kind, layers):
    plan = StagePlan.from_list(layers)
    model = StagedViT(make(kind), plan, mean=(0.5,), std=(0.5,)).eval().requires_grad_(False)
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    logits, before = model(images), model.weights()
    steps, known = [], before
    for name, randomised in cascade(model, seed=1):
        now = randomised.weights()
        steps.append((name, {key for key in now if not torch.equal(now[key], known[key])}))
        known = now
        assert not torch.equal(randomised(images), logits)
    assert [name for name, _ in steps] == ["head", "layer 1", "layer 0", "embedding"]
    assert "classifier.weight" in steps[0][1]
    # Each parameter changes once, and keeps its entries.
    changed = [key for _, keys in steps for key in keys]
    assert sorted(changed) == sorted(before)
    for key, value in known.items():
        assert torch.equal(value.flatten().sort()[0], before[key].flatten().sort()[0])
    # The original is as it was.
    assert all(torch.equal(value, before[key]) for key, value in model.weights().items())
    assert torch.equal(model(images), logits)
    again = [each.weights() for _, each in cascade(model, seed=1)][-1]
    assert all(torch.equal(again[key], known[key]) for key in known)
