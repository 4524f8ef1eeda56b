"""The planner's tests plan for a machine without a GPU, whatever machine they run on."""

import pytest

from cxr_vit.planner import hardware


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "_DRIVERS", ())
