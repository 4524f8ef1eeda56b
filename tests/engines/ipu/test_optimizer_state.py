"""Conversion of PopTorch's optimizer state."""

import pytest
import torch

from cxr_vit.engines.ipu.optimizer import from_poptorch, to_poptorch
from cxr_vit.engines.optim import torch_slots

HUB_NAMES = {"model.stages.0.a.weight": "vit.a.weight", "model.stages.1.b": "vit.b"}
THEIRS = {hub: name for name, hub in HUB_NAMES.items()}
STATE = {
    "ipu_state": {
        "Accl1___model.stages.0.a.weight": torch.ones(2, dtype=torch.float16),
        "Accl2___model.stages.0.a.weight": torch.full((2,), 2.0),
        "Step___model.stages.0.a.weight": torch.tensor(7.0),
        "Accl1___model.stages.1.b": torch.zeros(3, dtype=torch.float16),
        "lossScaleUpdateFactor": torch.tensor(0.5),
    },
    "ipu_param": {
        "learningRate___specific___model.stages.1.b": torch.tensor(0.1),
        "weightDecay___default___FLOAT": torch.tensor(0.2),
        "lossScaling_FLOAT": torch.tensor(1024.0),
    },
}
HALF = {"Accl1": torch.float16, "Accl2": torch.float32}


def test_adamw_state_has_torchs_slots():
    slots = from_poptorch(STATE, HUB_NAMES, "poptorch.AdamW")
    assert set(slots["vit.a.weight"]) == {"exp_avg", "exp_avg_sq", "step"}
    assert slots["vit.a.weight"]["step"] == 7
    assert set(torch_slots(slots["vit.b"])) == {"exp_avg"}


@pytest.mark.parametrize("kind", ["poptorch.AdamW", "poptorch.LAMB", "poptorch.SGD"])
def test_conversion_to_slots_and_back_is_exact(kind):
    back = to_poptorch(from_poptorch(STATE, HUB_NAMES, kind), THEIRS, HALF)
    for table, values in STATE.items():
        assert set(back[table]) == set(values)
        for key, value in values.items():
            assert torch.equal(back[table][key], value), key
            assert back[table][key].dtype == value.dtype


def test_other_optimizers_keep_poptorchs_names():
    slots = from_poptorch(STATE, HUB_NAMES, "poptorch.LAMB")
    assert set(slots["vit.a.weight"]) == {"ipu_state:Accl1", "ipu_state:Accl2", "ipu_state:Step"}
    assert torch_slots(slots["vit.a.weight"]) == {}


def test_torchs_moments_are_cast_to_the_devices_dtype():
    slots = {"vit.b": {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
    state = to_poptorch(slots, THEIRS, HALF)["ipu_state"]
    assert state["Accl1___model.stages.1.b"].dtype == torch.float16
    assert state["Accl2___model.stages.1.b"].dtype == torch.float32


def test_slots_are_copies():
    slots = from_poptorch(STATE, HUB_NAMES, "poptorch.AdamW")
    slots["vit.a.weight"]["exp_avg_sq"].zero_()
    assert STATE["ipu_state"]["Accl2___model.stages.0.a.weight"].sum() == 4


def test_no_state_is_no_slots():
    assert from_poptorch({"ipu_state": None, "ipu_param": None}, HUB_NAMES, "poptorch.SGD") == {}
