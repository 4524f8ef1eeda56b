import pytest
import torch

from cxr_vit.engines.optim import check_kind, torch_slots
from cxr_vit.errors import CheckpointError


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("torch.AdamW", "torch.AdamW"),
        ("torch.AdamW", "poptorch.AdamW"),
        ("poptorch.AdamW", "torch.AdamW"),
        ("poptorch.LAMB", "poptorch.LAMB"),
        ("", "torch.SGD"),
    ],
)
def test_state_of_the_same_meaning_is_accepted(given, own):
    check_kind(given, own)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("torch.SGD", "poptorch.SGD"),  # PopART's velocity is scaled with the loss
        ("poptorch.LAMB", "torch.AdamW"),
        ("torch.AdamW", "torch.SGD"),
        ("poptorch.AdamW", "poptorch.LAMB"),
    ],
)
def test_state_of_another_meaning_is_refused_with_advice(given, own):
    with pytest.raises(CheckpointError, match=r"train\.resume_weights_only=true") as caught:
        check_kind(given, own)
    assert given in str(caught.value)
    assert own in str(caught.value)


def test_slots_of_poptorch_alone_are_left_out():
    slots = {"exp_avg": torch.ones(2), "ipu_param:lossScaling_FLOAT": torch.ones(1)}
    assert list(torch_slots(slots)) == ["exp_avg"]
