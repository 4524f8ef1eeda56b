"""Warnings before a run on IPUs, and the plan of its figures."""

import logging
import re

import pytest

from cxr_vit.config import check, read_config
from cxr_vit.errors import ConfigError
from cxr_vit.planner.estimate import (
    FREEZE,
    describe_memory,
    make_plan,
    plan_evaluation,
    plan_of_run,
    preflight,
)
from cxr_vit.planner.hardware import find_target
from cxr_vit.planner.report import plan_lines

from .shapes import DEMO, ROOT, pod4

TOO_LARGE = "batch.micro_batch_size=34"


def test_plan_that_fits_is_silent(caplog):
    preflight(pod4(), "poptorch")
    assert caplog.messages == []
    assert describe_memory(pod4()) == [
        "predicted memory of IPU 0, the fullest: 603 of 941 MB, 64 %: fits."
    ]


def test_plan_that_does_not_fit_is_a_warning(caplog):
    preflight(pod4(TOO_LARGE), "poptorch")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert [record.getMessage()] == describe_memory(pod4(TOO_LARGE))
    assert "does not fit" in record.getMessage()


def test_strict_plan_that_does_not_fit_stops():
    with pytest.raises(ConfigError, match=r"does not fit.*planner.strict=true stops here"):
        preflight(pod4(TOO_LARGE, "planner.strict=true"), "poptorch")
    preflight(pod4("planner.strict=true"), "poptorch")


def test_frozen_weights_are_not_counted_and_stop_no_training(caplog):
    config = pod4(TOO_LARGE, "planner.strict=true", "model.freeze=trunk")
    preflight(config, "poptorch")
    (message,) = caplog.messages
    assert "does not fit. model.freeze is not taken into account: training needs less" in message
    assert FREEZE in plan_lines(config, make_plan(config))
    assert FREEZE not in plan_lines(pod4(), make_plan(pod4()))
    with pytest.raises(ConfigError, match=r"evaluation: .*planner.strict=true stops here"):
        preflight(config.changed(batch={"eval_micro_batch_size": 100}), "poptorch")


def test_evaluation_that_does_not_fit_is_a_warning(caplog):
    large = "batch.eval_micro_batch_size=100"
    preflight(pod4(large), "poptorch")
    (message,) = caplog.messages
    assert message.startswith("evaluation: predicted memory of IPU")
    (size,) = re.findall(r"Predicted to fit: batch\.eval_micro_batch_size=(\d+)\.", message)
    assert plan_evaluation(pod4(f"batch.eval_micro_batch_size={size}")).plan.fits
    assert not plan_evaluation(pod4(f"batch.eval_micro_batch_size={int(size) + 1}")).plan.fits
    with pytest.raises(ConfigError, match=r"evaluation: .*planner.strict=true stops here"):
        preflight(pod4(large, "planner.strict=true"), "poptorch")


def advised(config):
    """Return the changes that are enough by the message, and those that only help."""
    message = describe_memory(config)[0]
    enough, _, less = message.partition("Each of these helps")
    setting = r"[a-z_]+\.[a-z_]+=\w+"
    return [
        [change.split() for change in re.findall(rf"{setting}(?: {setting})*", part)]
        for part in (enough, less)
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        [TOO_LARGE],
        ["batch.micro_batch_size=16", "pipeline.recompute=stage_inputs"],
        ["batch.micro_batch_size=16", "pipeline.recompute=every_layer"],
        ["model.name=vit-huge", "model.patch_size=14", "pipeline.layers_per_stage=[8,8,8,8]"],
    ],
    ids=["large", "keeps little", "keeps all", "huge"],
)
def test_advised_changes_help(overrides):
    if "model.name=vit-huge" in overrides:
        overrides = [*overrides, "pipeline.recompute=every_layer"]
    config = pod4(*overrides)
    before = make_plan(config)
    assert not before.fits
    enough, less = advised(config)
    assert enough or less
    for change in enough:
        changed = make_plan(check(pod4(*overrides, *change)))
        assert changed.fits, change
        assert changed.work.batch.global_batch_size == before.work.batch.global_batch_size
    for change in less:
        plan = make_plan(check(pod4(*overrides, *change)))
        assert not plan.fits
        assert plan.fullest.memory.share < before.fullest.memory.share, change


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["batch.micro_batch_size=32", "batch.gradient_accumulation=32"],
            ["batch.micro_batch_size=8", "batch.gradient_accumulation=128"],
        ),
        (
            ["batch.micro_batch_size=16", "batch.global_batch_size=1024"],
            ["batch.micro_batch_size=8"],
        ),
    ],
)
def test_advised_micro_batch_keeps_the_global_batch(overrides, expected):
    every_layer = "pipeline.recompute=every_layer"
    assert expected in advised(pod4(*overrides, every_layer))[0]
    check(pod4(*overrides, *expected))


def test_moments_are_sharded_over_the_replicas_of_one_process(caplog):
    shared = read_config(
        [ROOT / "configs" / "vit_pod16.yaml"],
        ["batch.micro_batch_size=8", "optim.first_moment=fp32"],
    )
    preflight(shared, "poptorch", local_replicas=4)
    assert caplog.messages == []
    preflight(shared, "poptorch", local_replicas=1)
    (message,) = caplog.messages
    assert "fullest" in message
    smaller = re.search(r"batch\.micro_batch_size=(\d+)", message)
    alone = shared.changed(batch={"micro_batch_size": int(smaller.group(1))})
    assert make_plan(alone, local_replicas=1).fits, "the advice counts one replica, too"


@pytest.mark.parametrize("engine", ["torch", "pipeline"])
def test_other_engines_are_not_checked_against_an_ipus_memory(engine, caplog):
    preflight(pod4(TOO_LARGE, "planner.strict=true"), engine)
    assert caplog.messages == []


def test_unknown_model_is_not_predicted(caplog):
    unknown = "model.name=owner/model"
    (message,) = describe_memory(pod4(unknown))
    assert message.startswith("memory is not predicted: model.name=")
    preflight(pod4(unknown), "poptorch")
    assert caplog.messages == []
    preflight(pod4(unknown, "planner.strict=true"), "poptorch")
    assert "memory is not predicted" in caplog.messages[0]


def test_memory_is_that_of_the_configured_ipu(caplog):
    for hardware in ("auto", "mk2", "bow"):
        preflight(pod4(TOO_LARGE, f"planner.hardware={hardware}"), "poptorch")
    assert len(caplog.records) == 3
    assert len({record.getMessage() for record in caplog.records}) == 1, "both have as much"


@pytest.mark.parametrize("hardware", ["auto", "bow"])
def test_plan_of_a_run_is_that_of_its_ipus(hardware):
    config = pod4(f"planner.hardware={hardware}", "engine.device=cpu")
    plan = plan_of_run(config)
    assert plan is not None
    assert plan.target == find_target(config, "poptorch")
    assert (plan.target.place, plan.work.schedule) == ("IPU", "lockstep")


@pytest.mark.parametrize(
    "overrides",
    [
        ["pipeline.layers_per_stage=[4,0,4,4]", "pipeline.recompute=every_layer"],
        ["model.name=owner/model"],
    ],
)
def test_plan_of_a_run_is_none_if_it_cannot_be_made(overrides):
    assert plan_of_run(pod4(*overrides)) is None


def test_plan_of_a_run_does_not_check_the_rules_of_ipus():
    assert plan_of_run(pod4("pipeline.available_memory_proportion=[0.3,0.3]")) is not None
    assert plan_of_run(read_config([DEMO])) is not None
