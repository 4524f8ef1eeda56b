"""The batch arithmetic."""

import pytest

from cxr_vit.config import BatchPlan, check, load_config
from cxr_vit.errors import ConfigError


def plan(*overrides: str) -> BatchPlan:
    return BatchPlan.from_section(load_config([], [f"batch.{text}" for text in overrides]).batch)


def test_global_batch_is_the_product():
    batch = plan("micro_batch_size=2", "gradient_accumulation=3", "replicas=5")
    assert batch.global_batch_size == 30


def test_host_batch_holds_the_device_iterations():
    batch = plan("micro_batch_size=2", "gradient_accumulation=3", "device_iterations=7")
    assert (batch.global_batch_size, batch.host_batch_size) == (6, 42)


def test_evaluation_host_batch_knows_no_accumulation():
    batch = plan(
        "eval_micro_batch_size=3",
        "eval_device_iterations=4",
        "replicas=5",
        "gradient_accumulation=7",
        "device_iterations=11",
    )
    assert batch.eval_host_batch_size == 60


def test_accumulation_follows_from_the_global_batch():
    batch = plan("micro_batch_size=2", "replicas=4", "global_batch_size=128")
    assert batch.gradient_accumulation == 16
    assert batch.global_batch_size == 128


def test_description_has_the_numbers():
    text = "\n".join(
        plan(
            "micro_batch_size=2",
            "gradient_accumulation=3",
            "replicas=5",
            "device_iterations=7",
            "eval_micro_batch_size=11",
            "eval_device_iterations=13",
        ).describe()
    )
    assert "30 samples per weight update = 2 micro-batch x 3 accumulation x 5 replicas" in text
    assert "210 samples per host call = 30 global batch x 7 device iterations" in text
    assert "715 samples per host call = 11 micro-batch x 5 replicas x 13 device iterations" in text


@pytest.mark.parametrize(
    ("overrides", "legal"),
    [
        (["micro_batch_size=4", "global_batch_size=30"], "28 or 32"),
        (["micro_batch_size=4", "replicas=3", "global_batch_size=30"], "24 or 36"),
        (["micro_batch_size=8", "global_batch_size=3"], "8"),
    ],
)
def test_global_batch_of_broken_micro_batches_names_the_nearest(overrides, legal):
    with pytest.raises(ConfigError) as caught:
        check(load_config([], [f"batch.{text}" for text in overrides]))
    assert f"Nearest legal values: {legal}." in str(caught.value)


@pytest.mark.parametrize("overrides", [["micro_batch_size=4", "global_batch_size=32"], []])
def test_whole_micro_batches_are_no_problem(overrides):
    config = load_config([], [f"batch.{text}" for text in overrides])
    assert check(config) is config
