"""Options: freezing, types, and the names that the compiler knows."""

from __future__ import annotations

from typing import Any, Tuple

import pytest
import torch

from .models import INPUTS, LABELS, Net, make_options


def test_options_freeze(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    options = make_options(poptorch)
    executor = poptorch.trainingModel(Net(poptorch), options)
    for change in (
        lambda: options.deviceIterations(2),
        lambda: options.Training.gradientAccumulation(4),
        lambda: options._Popart.set("enableOutlining", True),
        lambda: options.Precision.enableStochasticRounding(True),
    ):
        with pytest.raises(AttributeError, match="Can't modify frozen Options"):
            change()
    assert executor.options is not options
    options.clone().deviceIterations(2)
    loaded = make_options(poptorch)
    poptorch.DataLoader(loaded, torch.utils.data.TensorDataset(INPUTS))
    with pytest.raises(AttributeError, match="frozen"):
        loaded.deviceIterations(2)


def test_options_check_types(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    options = poptorch.Options()
    for call in (
        lambda: options.deviceIterations(2.0),
        lambda: options.Training.gradientAccumulation("4"),
        lambda: options.outputMode(2),
        lambda: options.outputMode(poptorch.OutputMode.EveryN),
        lambda: options.randomSeed("0"),
        lambda: options.setAvailableMemoryProportion({"0": 0.1}),
        lambda: options.setExecutionStrategy("pipelined"),
        lambda: options.connectionType(0),
        lambda: options.TensorLocations.setOptimizerLocation({}),
        lambda: poptorch.TensorLocationSettings().useOnChipStorage(1),
        lambda: options.toDict(),  # no output mode was chosen
    ):
        with pytest.raises(AssertionError):
            call()
    for refused in (
        lambda: options.Training.accumulationAndReplicationReductionType("Mean"),
        lambda: options.Precision.setPartialsType(torch.bfloat16),
    ):
        with pytest.raises(ValueError, match=r"."):
            refused()
    with pytest.raises(AttributeError, match="Invalid attribute"):
        options.no_such_option  # noqa: B018
    options.deviceIterations(3)
    options.device_iterations += 1
    assert (options.device_iterations, options.replication_factor) == (4, 1)
    assert options.exists("device_iterations") and not options.exists("random_seed")


def test_random_seed_also_seeds_the_host(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both
    poptorch.Options().randomSeed(5)
    assert torch.initial_seed() == 5


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("noSuchOption", 3, "uint64"),
        ("autoRecomputation", True, "bool"),
        ("timeLimitScheduler", 1, "uint64"),
        ("enableOutlining", 1, "uint64"),
        ("cachePath", ["a"], "set / vector"),
    ],
)
def test_unknown_options_of_the_compiler_are_refused(
    both: Tuple[Any, Any], name: str, value: Any, kind: str
) -> None:
    poptorch, _ = both
    options = make_options(poptorch)
    options._Popart.set(name, value)
    executor = poptorch.trainingModel(Net(poptorch), options)
    with pytest.raises(poptorch.Error, match=f"Unknown {kind} option {name}"):
        executor.compile(INPUTS, LABELS)
